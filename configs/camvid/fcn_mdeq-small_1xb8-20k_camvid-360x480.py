# MDEQ-small from scratch, 9.0 M parameters, in place of the pre-training on
# ImageNet that the same model has on Cityscapes.
_base_ = [
    '../_base_/models/fcn_mdeq_small.py',
    '../_base_/datasets/camvid_360x480.py',
    '../_base_/schedules/camvid_20k.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(360, 480)),
    backbone=dict(init_cfg=None),
    decode_head=dict(
        num_classes=11,
        loss_decode=dict(_delete_=True, type='CrossEntropyLoss', avg_non_ignore=True),
    ),
)

default_hooks = dict(
    checkpoint=dict(interval=2000, max_keep_ckpts=2, save_best='mIoU'),
    monitor=dict(type='EquilibriumMonitorHook'),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
tta_model = dict(type='ImplicitSegTTAModel')
