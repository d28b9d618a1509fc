# An MDEQ of about 170 thousand parameters for 64x64 images: three branches at
# 16x16, 8x8 and 4x4 pixels.
channels = (24, 32, 40)
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[127.5],
    std=[60.0],
    bgr_to_rgb=False,
    pad_val=0,
    seg_pad_val=255,
    size=(64, 64),
)
model = dict(
    type='ImplicitEncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='MDEQ',
        arch=dict(
            channels=channels,
            num_groups=8,
            expansion=2,
            downsample_times=2,
        ),
        in_channels=1,
        # The plain iteration, which the gradient goes on with.
        solver=dict(type='PicardSolver', max_steps=4, tol=0),
        eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
        gradient=dict(type='PhantomGradient', steps=3, unroll=True),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=channels,
        in_index=(0, 1, 2),
        input_transform='resize_concat',
        channels=sum(channels),
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0, avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
