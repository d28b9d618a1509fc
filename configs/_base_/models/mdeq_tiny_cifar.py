# model settings: MDEQ-tiny for CIFAR-10, 0.16 M parameters
model = dict(
    type='ImplicitImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch='cifar-tiny',
        # Why these: docs/choosing.md. The authors' are in *_official_* configs.
        solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
        eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
        gradient=dict(type='PhantomGradient', steps=3, unroll=True),
    ),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(24, 24),
            head_channels=(8, 16),
            out_channels=200,
        ),
        dict(type='MDEQPoolBranches', in_channels=200),
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
