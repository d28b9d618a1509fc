# model settings: an MDEQ of 0.16 M parameters for CIFAR-10, whose three branches have
# 16x16, 8x8 and 4x4 pixels
model = dict(
    type='ImplicitImageClassifier',
    backbone=dict(
        type='MDEQ',
        arch=dict(channels=(24, 48, 48), num_groups=8, expansion=1, downsample_times=1),
        solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
        eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
        gradient=dict(type='PhantomGradient', steps=3, unroll=True),
    ),
    neck=dict(type='MDEQPoolBranches', in_channels=(24, 48, 48)),
    head=dict(
        type='LinearClsHead',
        in_channels=120,
        num_classes=10,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)
