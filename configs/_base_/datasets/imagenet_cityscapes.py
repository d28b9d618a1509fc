# ImageNet-1k and Cityscapes at once, each with its own pipeline; the folders are
# those of imagenet_bs32.py and cityscapes.py.
_base_ = './cityscapes.py'

cls_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
cls_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

# A batch holds 3 items, 24 images of ImageNet and 3 of Cityscapes: 8 images of
# 224x224 have about as many pixels as a crop of 512x1024 (0.40 and 0.52 million), so
# that the tasks share the time of an iteration evenly.
train_dataloader = dict(
    batch_size=3,
    num_workers=8,
    dataset=dict(
        _delete_=True,
        type='MultiTaskDataset',
        counts=dict(cls=8, seg=1),
        datasets=dict(
            cls=dict(
                type='ImageNet',
                data_root='data/imagenet',
                split='train',
                pipeline=cls_train_pipeline,
            ),
            seg={{_base_.train_dataloader.dataset}},
        ),
    ),
)
# One at a time, as Cityscapes alone: its images are large, and are the slow ones.
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiTaskDataset',
        pair=False,
        datasets=dict(
            cls=dict(
                type='ImageNet',
                data_root='data/imagenet',
                split='val',
                pipeline=cls_test_pipeline,
            ),
            seg={{_base_.val_dataloader.dataset}},
        ),
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    _delete_=True,
    type='MultiTaskMetric',
    cls=dict(type='Accuracy', topk=(1, 5)),
    seg={{_base_.val_evaluator}},
)
test_evaluator = val_evaluator
