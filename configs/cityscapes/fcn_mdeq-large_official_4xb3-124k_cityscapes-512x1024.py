# The authors' solver, gradient and stopping rule: Broyden's method with limits of 27
# and 30 updates, that is 28 and 31 evaluations of f, the implicit gradient, and an
# absolute residual of 1e-3, which is so small that a solve practically always runs to
# its limit. The rule holds for the forward solve alone: the backward solve works on an
# incoming gradient scaled to unit norm per sample and is always relative.
_base_ = './fcn_mdeq-large_4xb3-124k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(
        # The image enters the first branch, equilibria are returned as they are.
        arch=dict(_delete_=True, preset='large', injection='first'),
        norm_cfg=dict(momentum=0.01),
        out_norm_cfg=None,
        solver=dict(
            _delete_=True, type='BroydenSolver', max_steps=28, tol=1e-3, norm='abs'
        ),
        eval_solver=None,
        gradient=dict(
            _delete_=True,
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=31, tol=1e-3),
        ),
        init_cfg=dict(
            checkpoint='work_dirs/mdeq-large_official_4xb32-100e_in1k/epoch_100.pth'
        ),
    ),
    decode_head=dict(norm_cfg=dict(momentum=0.01)),
)

# Training starts with 3 unrolled steps of f, for this share of its iterations.
default_hooks = dict(
    warmup=dict(type='UnrollWarmupHook', unroll_steps=3, end=60000 / 124000),
)
