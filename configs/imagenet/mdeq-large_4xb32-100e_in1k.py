_base_ = [
    '../_base_/models/mdeq_large.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs128_100e_wd1e-4.py',
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
