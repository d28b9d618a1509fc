# Handwritten digits and scenes of them at once, each with its own pipeline; the
# folders are those of digits_bs64.py and digit_scenes.py.
_base_ = './digit_scenes.py'

cls_train_pipeline = [
    dict(type='LoadImageFromFile', color_type='grayscale'),
    dict(type='Resize', scale=32, interpolation='bilinear'),
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='PackInputs'),
]
cls_test_pipeline = [
    dict(type='LoadImageFromFile', color_type='grayscale'),
    # As of digits_bs64.py.
    dict(type='RandomGrayscale', prob=1.0, channel_weights=(1, 2, 1)),
    dict(type='Resize', scale=32, interpolation='bilinear'),
    dict(type='PackInputs'),
]

# 32 digits of 32x32 pixels beside 16 scenes of 64x64 in a batch.
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiTaskDataset',
        counts=dict(cls=2, seg=1),
        datasets=dict(
            cls=dict(
                type='CustomDataset',
                data_root='data/digits',
                data_prefix='train',
                pipeline=cls_train_pipeline,
            ),
            seg={{_base_.train_dataloader.dataset}},
        ),
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiTaskDataset',
        pair=False,
        datasets=dict(
            cls=dict(
                type='CustomDataset',
                data_root='data/digits',
                data_prefix='test',
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
    cls=dict(type='Accuracy', topk=(1,)),
    seg={{_base_.val_evaluator}},
)
test_evaluator = val_evaluator
