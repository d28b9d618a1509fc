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
    # A random f has no equilibrium: the first epochs train unrolled.
    warmup=dict(type='UnrollWarmupHook', unroll_steps=4, end=10, by_epoch=True),
    monitor=dict(type='EquilibriumMonitorHook', interval=6),
)
randomness = dict(seed=0)
