# An MDEQ of about 100 thousand parameters for 32x32 images: three branches at
# 8x8, 4x4 and 2x2 pixels.
model = dict(
    type='ImplicitImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch=dict(channels=(24, 24, 24), num_groups=8, expansion=2, downsample_times=2),
        in_channels=1,
        solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
        eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
        gradient=dict(type='PhantomGradient', steps=3),
        # One more evaluation of f a step, for half of the memory.
        with_cp=True,
    ),
    neck=dict(type='MDEQPoolBranches', in_channels=(24, 24, 24)),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=72,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)
