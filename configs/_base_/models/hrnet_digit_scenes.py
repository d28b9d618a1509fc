# HRNet narrowed to the parameter count of mdeq_digit_scenes.py: four branches, one
# module a stage.
_base_ = './mdeq_digit_scenes.py'
channels = (10, 14, 18, 22)
extra = dict(
    stage1=dict(
        num_modules=1,
        num_branches=1,
        block='BOTTLENECK',
        num_blocks=(1,),
        num_channels=channels[:1],
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
    backbone=dict(_delete_=True, type='HRNet', in_channels=1, extra=extra),
    decode_head=dict(
        in_channels=channels,
        in_index=(0, 1, 2, 3),
        channels=sum(channels),
    ),
)
