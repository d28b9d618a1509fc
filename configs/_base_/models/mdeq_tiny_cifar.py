# model settings: MDEQ-tiny for CIFAR-10, 0.16 M parameters
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch='cifar-tiny',
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
            in_channels=(24, 24),
            head_channels=(8, 16),
            out_channels=200,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(
        type='LinearClsHead',
        in_channels=200,
        num_classes=10,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
        # PyTorch's initialisation, as the official model has it.
        init_cfg=None,
    ),
)
