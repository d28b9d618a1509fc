# The authors' solver, gradient and stopping rule: Broyden's method with limits of 26
# and 27 updates, that is 27 and 28 evaluations of f, the implicit gradient, and an
# absolute residual of 1e-3, which is so small that a solve practically always runs to
# its limit. The rule holds for the forward solve alone: the backward solve works on an
# incoming gradient scaled to unit norm per sample and is always relative.
_base_ = './mdeq-xl_8xb32-100e_in1k.py'

model = dict(
    backbone=dict(
        # The image enters the first branch, equilibria are returned as they are.
        arch=dict(_delete_=True, preset='xl', injection='first'),
        out_norm_cfg=None,
        solver=dict(
            _delete_=True, type='BroydenSolver', max_steps=27, tol=1e-3, norm='abs'
        ),
        eval_solver=None,
        gradient=dict(
            _delete_=True,
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=28, tol=1e-3),
        ),
        init_cfg=[
            dict(type='Normal', layer='Conv2d', std=0.01),
            dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1, bias=0),
        ],
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
)

# Training starts with 4 unrolled steps of f, for this share of its iterations.
default_hooks = dict(
    warmup=dict(type='UnrollWarmupHook', unroll_steps=4, end=510000 / (100 * 10010)),
)
