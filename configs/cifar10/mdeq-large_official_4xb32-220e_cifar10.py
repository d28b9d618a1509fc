# The official CIFAR-10 settings, written out so that they stay what they are when
# a default changes: relative residuals and limits of 18 and 20 Broyden updates,
# that is 19 and 21 evaluations of f. The official norms are taken over the whole
# batch; here each sample has its own.
_base_ = './mdeq-large_4xb32-220e_cifar10.py'

model = dict(
    backbone=dict(
        solver=dict(type='BroydenSolver', max_steps=19, tol=1e-3, norm='rel'),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='BroydenSolver', max_steps=21, tol=1e-3),
        ),
    )
)
