_base_ = [
    '../_base_/models/mdeq_digits.py',
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/digits_30e.py',
    '../_base_/default_runtime.py',
]

# As long as the interval, so that logged times add up.
log_processor = dict(window_size=6)
default_hooks = dict(
    logger=dict(interval=6),
    checkpoint=dict(max_keep_ckpts=1),
    monitor=dict(type='EquilibriumMonitorHook', interval=6),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
randomness = dict(seed=0)
