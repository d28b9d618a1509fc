_base_ = './fcn_mdeq_small.py'

# model settings: MDEQ-XL for segmentation, 79.6 M parameters
model = dict(
    backbone=dict(
        arch='xl',
        drop_rate=0.04,
        init_cfg=dict(checkpoint='work_dirs/mdeq-xl_8xb32-100e_in1k/epoch_100.pth'),
    ),
    decode_head=dict(
        in_channels=[88, 176, 352, 704], channels=sum([88, 176, 352, 704])
    ),
)
