# model settings: MDEQ-XL for ImageNet, 90.5 M parameters
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch='xl',
        # max_steps counts evaluations of f. The official limits 26/27 count
        # Broyden's updates after the first evaluation: one less.
        solver=dict(type='BroydenSolver', max_steps=27, tol=1e-3, norm='rel'),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=28, tol=1e-3),
        ),
    ),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(88, 176, 352, 704),
            head_channels=(32, 64, 128, 256),
            out_channels=2048,
        ),
        dict(type='GlobalAveragePooling'),
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
)
