_base_ = [
    '../_base_/models/resnet_digits.py',
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/digits_30e.py',
    '../_base_/default_runtime.py',
]

# As long as the interval, so that logged times add up.
log_processor = dict(window_size=6)
default_hooks = dict(logger=dict(interval=6), checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
