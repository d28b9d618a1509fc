_base_ = [
    '../_base_/models/fcn_hr18s.py',
    '../_base_/datasets/cityscapes.py',
    '../_base_/schedules/cityscapes_bs12_124k.py',
    '../_base_/default_runtime_seg.py',
]

# Training images smaller than a crop are padded to its size.
model = dict(data_preprocessor=dict(size=(512, 1024)))

default_hooks = dict(
    checkpoint=dict(interval=4000, max_keep_ckpts=3, save_best='mIoU'),
)
