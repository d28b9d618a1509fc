# model settings: MDEQ-XL for ImageNet, 90.5 M parameters
model = dict(
    type='ImplicitImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch='xl',
        # Why these: docs/choosing.md. The authors' are in *_official_* configs.
        solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
        eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
        gradient=dict(type='PhantomGradient', steps=3, unroll=True),
    ),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=(88, 176, 352, 704),
            head_channels=(32, 64, 128, 256),
            out_channels=2048,
        ),
        dict(type='MDEQPoolBranches', in_channels=2048),
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
