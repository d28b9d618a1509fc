# A ResNet of as many parameters as mdeq-mini, with 16x16, 8x8 and 4x4 pixels as there,
# on its schedule.
_base_ = [
    '../_base_/datasets/cifar10_bs32.py',
    '../_base_/schedules/cifar10_bs128_22e.py',
    '../_base_/default_runtime.py',
]
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR',
        depth=18,
        num_stages=3,
        strides=(2, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stem_channels=15,
        base_channels=15,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        in_channels=60,
        num_classes=10,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)

train_dataloader = dict(batch_size=128, num_workers=1)
val_dataloader = dict(batch_size=128, num_workers=1)
test_dataloader = dict(batch_size=128, num_workers=1)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
