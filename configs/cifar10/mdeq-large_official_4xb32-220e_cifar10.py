# The authors' solver and gradient: Broyden's method with limits of 18 and 20 updates,
# that is 19 and 21 evaluations of f, relative residuals, and the implicit gradient.
# The official norms are taken over the whole batch; here each sample has its own.
_base_ = './mdeq-large_4xb32-220e_cifar10.py'

model = dict(
    backbone=dict(
        solver=dict(
            _delete_=True, type='BroydenSolver', max_steps=19, tol=1e-3, norm='rel'
        ),
        eval_solver=None,
        gradient=dict(
            _delete_=True,
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=21, tol=1e-3),
        ),
    )
)
