# model settings: MDEQ-small under PSPNet's head
norm_cfg = dict(type='SyncBN', requires_grad=True)
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
)
# Weights of the 19 classes of Cityscapes by their frequency, those of HRNet.
# fmt: off
class_weight = [
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
]
# fmt: on
model = dict(
    type='ImplicitEncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='MDEQ',
        arch='small',
        drop_rate=0.05,
        # Why these: docs/choosing.md. The authors' are in *_official_* configs.
        solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
        eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
        gradient=dict(type='PhantomGradient', steps=3, unroll=True),
        norm_cfg=norm_cfg,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mdeq-small_4xb32-100e_in1k/epoch_100.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(
        type='PSPHead',
        # The branches at 1/8, 1/16 and 1/32, brought to the size of the first.
        in_channels=[64, 128, 256],
        in_index=(1, 2, 3),
        input_transform='resize_concat',
        channels=256,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='ClassWeightedCrossEntropy',
            loss_weight=1.0,
            class_weight=class_weight,
        ),
    ),
    # model training and testing settings
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
