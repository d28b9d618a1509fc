_base_ = [
    '../_base_/models/fcn_hr18s.py',
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

default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=2, save_best='mIoU'))
