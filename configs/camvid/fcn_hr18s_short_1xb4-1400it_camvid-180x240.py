# HRNet-W18s from scratch, 3.9 M parameters, beside the short MDEQ config.
_base_ = [
    '../_base_/models/fcn_hr18s.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/schedules/camvid_short.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(160, 224)),
    backbone=dict(init_cfg=None),
    decode_head=dict(
        num_classes=11,
        loss_decode=dict(_delete_=True, type='CrossEntropyLoss', avg_non_ignore=True),
    ),
)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=350, max_keep_ckpts=2, save_best='mIoU'),
)
randomness = dict(seed=0)
