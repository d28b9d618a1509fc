# One MDEQ that reads digits and segments scenes of digits, for as many iterations as
# the scenes alone take in mdeq_1xb16-12e_digit-scenes-64x64.py, and on the same
# schedule. It sees each digit about 32 times, in mdeq_1xb64-30e_digits.py 30 times.
_base_ = [
    '../_base_/models/multi_task_mdeq_digits.py',
    '../_base_/datasets/digits_digit_scenes.py',
    '../_base_/schedules/digit_scenes_12e.py',
    '../_base_/default_runtime_seg.py',
]

# Epochs are counted, unlike in mmseg's own schedules. The window is as long as the
# interval, so that logged times add up.
log_processor = dict(by_epoch=True, window_size=10)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=1),
    visualization=dict(type='MultiTaskSegVisualizationHook'),
    monitor=dict(type='EquilibriumMonitorHook', interval=10),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
# HRNet's learning rate, 8e-3, drives f out of contraction.
optim_wrapper = dict(type='EquilibriumOptimWrapper', optimizer=dict(lr=3e-3))
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
tta_model = dict(type='ImplicitSegTTAModel')
randomness = dict(seed=0)
