_base_ = [
    '../_base_/models/hrnet_digit_scenes.py',
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
)
randomness = dict(seed=0)
