# model settings: MDEQ-large for ImageNet, 67.1 M parameters
_base_ = './mdeq_small.py'
model = dict(
    backbone=dict(arch='large'),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(80, 160, 320, 640),
            head_channels=(32, 64, 128, 256),
            out_channels=2048,
        ),
        dict(type='MDEQPoolBranches', in_channels=2048),
    ],
)
