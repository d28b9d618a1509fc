# The authors' solver, gradient and stopping rule: Broyden's method with limits of 27
# and 30 updates, that is 28 and 31 evaluations of f, the implicit gradient, and an
# absolute residual of 1e-3, which is so small that a solve practically always runs to
# its limit. The rule holds for the forward solve alone: the backward solve works on an
# incoming gradient scaled to unit norm per sample and is always relative.
_base_ = './fcn_mdeq-small_4xb3-124k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(
        solver=dict(
            _delete_=True, type='BroydenSolver', max_steps=28, tol=1e-3, norm='abs'
        ),
        eval_solver=None,
        gradient=dict(
            _delete_=True,
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=31, tol=1e-3),
        ),
    )
)
