_base_ = [
    '../_base_/models/mdeq_digit_scenes.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/digit_scenes_12e.py',
    '../_base_/default_runtime_seg.py',
]

# Epochs are counted, unlike in mmseg's own schedules. The window is as long as the
# interval, so that logged times add up.
log_processor = dict(by_epoch=True, window_size=10)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=1),
    # A random f has no equilibrium: the first epochs train unrolled. They are most of
    # the epochs, because unrolled steps are cheaper.
    warmup=dict(type='UnrollWarmupHook', unroll_steps=4, end=8, by_epoch=True),
    monitor=dict(type='EquilibriumMonitorHook', interval=10),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
tta_model = dict(type='ImplicitSegTTAModel')
randomness = dict(seed=0)
