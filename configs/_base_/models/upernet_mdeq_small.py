# model settings: MDEQ-small under UPerNet's head
_base_ = './fcn_mdeq_small.py'
model = dict(
    decode_head=dict(
        _delete_=True,
        type='UPerHead',
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=256,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg={{_base_.norm_cfg}},
        align_corners=False,
        loss_decode=dict(
            type='ClassWeightedCrossEntropy',
            loss_weight=1.0,
            class_weight={{_base_.class_weight}},
        ),
    ),
)
