# The authors' solver and gradient: Broyden's method with limits of 18 and 20 updates,
# that is 19 and 21 evaluations of f, relative residuals, and the implicit gradient.
# The official norms are taken over the whole batch; here each sample has its own.
_base_ = './mdeq-large_4xb32-220e_cifar10.py'

model = dict(
    backbone=dict(
        # The image enters the first branch, equilibria are returned as they are.
        arch=dict(_delete_=True, preset='cifar-large', injection='first'),
        drop_rate=0.3,
        out_norm_cfg=None,
        solver=dict(
            _delete_=True, type='BroydenSolver', max_steps=19, tol=1e-3, norm='rel'
        ),
        eval_solver=None,
        gradient=dict(
            _delete_=True,
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=21, tol=1e-3),
        ),
        init_cfg=[
            dict(type='Normal', layer='Conv2d', std=0.01),
            dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1, bias=0),
        ],
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
)

# Training starts with 10 unrolled steps of f, for this share of its iterations.
default_hooks = dict(
    warmup=dict(type='UnrollWarmupHook', unroll_steps=10, end=20000 / (220 * 391)),
)
