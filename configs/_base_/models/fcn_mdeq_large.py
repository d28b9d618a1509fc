_base_ = './fcn_mdeq_small.py'

# model settings: MDEQ-large for segmentation, 56.0 M parameters
model = dict(
    backbone=dict(
        arch='large',
        drop_rate=0.03,
        init_cfg=dict(checkpoint='work_dirs/mdeq-large_4xb32-100e_in1k/epoch_100.pth'),
    ),
    decode_head=dict(
        in_channels=[80, 160, 320, 640], channels=sum([80, 160, 320, 640])
    ),
)
