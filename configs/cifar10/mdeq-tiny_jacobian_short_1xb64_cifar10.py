# The short training with Jacobian regularisation: the same budget, in which half of
# the iterations carry the Jacobian loss.
_base_ = './mdeq-tiny_short_1xb64_cifar10.py'

default_hooks = dict(
    jacobian=dict(
        type='JacobianScheduleHook', weight=1.0, frequency=0.5, by_epoch=False
    )
)
