# model settings: MDEQ-large for CIFAR-10, 11.1 M parameters
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch='cifar-large',
        # max_steps counts evaluations of f. The official limits 18/20 count
        # Broyden's updates after the first evaluation: one less.
        solver=dict(type='BroydenSolver', max_steps=19, tol=1e-3, norm='rel'),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=21, tol=1e-3),
        ),
    ),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(32, 64, 128, 256),
            head_channels=(14, 28, 56, 112),
            out_channels=1680,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(
        type='LinearClsHead',
        in_channels=1680,
        num_classes=10,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
        # PyTorch's initialisation, as the official model has it.
        init_cfg=None,
    ),
)
