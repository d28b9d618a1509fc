# As mdeq_1xb64-30e_digits.py, with the Jacobian loss in half of the iterations.
_base_ = './mdeq_1xb64-30e_digits.py'

default_hooks = dict(
    jacobian=dict(type='JacobianScheduleHook', weight=1.0, frequency=0.5)
)
