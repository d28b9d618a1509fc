# The authors' solver, gradient and stopping rule: Broyden's method with limits of 26
# and 27 updates, that is 27 and 28 evaluations of f, the implicit gradient, and an
# absolute residual of 1e-3, which is so small that a solve practically always runs to
# its limit. The rule holds for the forward solve alone: the backward solve works on an
# incoming gradient scaled to unit norm per sample and is always relative.
_base_ = './mdeq-small_4xb32-100e_in1k.py'

model = dict(
    backbone=dict(
        solver=dict(
            _delete_=True, type='BroydenSolver', max_steps=27, tol=1e-3, norm='abs'
        ),
        eval_solver=None,
        gradient=dict(
            _delete_=True,
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=28, tol=1e-3),
        ),
    )
)
