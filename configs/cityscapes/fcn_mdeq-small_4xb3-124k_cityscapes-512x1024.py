_base_ = [
    '../_base_/models/fcn_mdeq_small.py',
    '../_base_/datasets/cityscapes.py',
    '../_base_/schedules/cityscapes_bs12_124k.py',
    '../_base_/default_runtime_seg.py',
]

# Training images smaller than a crop are padded to its size.
model = dict(data_preprocessor=dict(size=(512, 1024)))

default_hooks = dict(
    checkpoint=dict(interval=4000, max_keep_ckpts=3, save_best='mIoU'),
    monitor=dict(type='EquilibriumMonitorHook'),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
tta_model = dict(type='ImplicitSegTTAModel')
