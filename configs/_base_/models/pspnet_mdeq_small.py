# model settings: MDEQ-small under PSPNet's head
_base_ = './fcn_mdeq_small.py'
model = dict(
    decode_head=dict(
        _delete_=True,
        type='PSPHead',
        # The branches at 1/8, 1/16 and 1/32, brought to the size of the first.
        in_channels=[64, 128, 256],
        in_index=(1, 2, 3),
        input_transform='resize_concat',
        channels=256,
        pool_scales=(1, 2, 3, 6),
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
