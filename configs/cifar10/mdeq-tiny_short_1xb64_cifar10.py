# MDEQ-tiny on CIFAR-10 for a short budget on a CPU: 400 iterations, then one
# evaluation on all test images. It shows that training works, not how well it ends.
# Another length takes three values on the command line:
#   --cfg-options train_cfg.max_iters=800 train_cfg.val_interval=800
#   param_scheduler.T_max=800
_base_ = ['../_base_/models/mdeq_tiny_cifar.py', '../_base_/cifar10_short.py']

default_hooks = dict(
    monitor=dict(type='EquilibriumMonitorHook'),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
