# model settings: MDEQ-small with the heads of ImageNet and of Cityscapes, 17.0 M
# parameters. The backbone is that of segmentation, with its dropout.
_base_ = './fcn_mdeq_small.py'

model = dict(
    type='MultiTaskMDEQ',
    data_preprocessor=dict(
        _delete_=True,
        type='MultiTaskDataPreprocessor',
        cls=dict(
            type='ClsDataPreprocessor',
            num_classes=1000,
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True,
        ),
        seg={{_base_.data_preprocessor}},
    ),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(32, 64, 128, 256),
            head_channels=(24, 48, 96, 192),
            out_channels=2048,
        ),
        dict(type='MDEQPoolBranches', in_channels=2048),
    ],
    head=dict(
        type='LinearClsHead',
        in_channels=2048,
        num_classes=1000,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
        # PyTorch's initialisation, as the official model has it.
        init_cfg=None,
    ),
    loss_weights=dict(cls=1.0, seg=1.0),
)
