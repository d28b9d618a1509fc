# MDEQ-tiny with MDEQ-large's data and schedule.
_base_ = [
    '../_base_/models/mdeq_tiny_cifar.py',
    '../_base_/datasets/cifar10_bs32.py',
    '../_base_/schedules/cifar10_bs128_220e.py',
    '../_base_/default_runtime.py',
]

default_hooks = dict(
    monitor=dict(type='EquilibriumMonitorHook'),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
