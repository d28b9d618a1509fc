# model settings: MDEQ-XL for ImageNet, 90.5 M parameters
_base_ = './mdeq_small.py'
model = dict(
    backbone=dict(arch='xl'),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(88, 176, 352, 704),
            head_channels=(32, 64, 128, 256),
            out_channels=2048,
        ),
        dict(type='MDEQPoolBranches', in_channels=2048),
    ],
)
