# HRNet narrowed to the parameter count of mdeq_digits.py: four branches, one
# module a stage, one block a branch. Its own classification neck has fixed widths
# of 128 to 1024 channels, so the same fusion stands here in MDEQ's width.
channels = (6, 8, 12, 16)
extra = dict(
    stage1=dict(
        num_modules=1,
        num_branches=1,
        block='BOTTLENECK',
        num_blocks=(1,),
        num_channels=(6,),
    ),
    stage2=dict(
        num_modules=1,
        num_branches=2,
        block='BASIC',
        num_blocks=(2, 2),
        num_channels=channels[:2],
    ),
    stage3=dict(
        num_modules=1,
        num_branches=3,
        block='BASIC',
        num_blocks=(2, 2, 2),
        num_channels=channels[:3],
    ),
    stage4=dict(
        num_modules=1,
        num_branches=4,
        block='BASIC',
        num_blocks=(2, 2, 2, 2),
        num_channels=channels,
    ),
)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='HRNet', in_channels=1, extra=extra),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=channels,
            head_channels=(4, 4, 6, 8),
            out_channels=64,
            init_cfg=None,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)
