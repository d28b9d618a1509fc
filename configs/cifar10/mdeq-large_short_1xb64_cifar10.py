# MDEQ-large on CIFAR-10 for a short budget on a CPU, with the data and schedule of
# the short MDEQ-tiny. It shows that training works, not how well it ends.
_base_ = ['../_base_/models/mdeq_large_cifar.py', '../_base_/cifar10_short.py']

default_hooks = dict(
    monitor=dict(type='EquilibriumMonitorHook'),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
