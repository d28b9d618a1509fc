# model settings: MDEQ-small under DeepLabV3+'s head
_base_ = './fcn_mdeq_small.py'
model = dict(
    decode_head=dict(
        _delete_=True,
        type='DepthwiseSeparableASPPHead',
        in_channels=256,
        in_index=3,
        channels=256,
        # A quarter of those for maps at 1/8: these are at 1/32.
        dilations=(1, 3, 6, 9),
        # Branch 0, at 1/4, which refines the edges.
        c1_in_channels=32,
        c1_channels=48,
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
