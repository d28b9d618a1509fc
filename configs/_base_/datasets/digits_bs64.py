# Handwritten digits of scikit-learn as image files, written by
# tools/dataset_converters/digits.py; 8x8 pixels, enlarged to 32x32, the smallest
# size for backbones that halve it five times.
dataset_type = 'CustomDataset'
data_preprocessor = dict(num_classes=10, mean=[77.8], std=[95.9], to_rgb=False)

train_pipeline = [
    dict(type='LoadImageFromFile', color_type='grayscale'),
    dict(type='Resize', scale=32, interpolation='bilinear'),
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='PackInputs'),
]

test_pipeline = [
    dict(type='LoadImageFromFile', color_type='grayscale'),
    # Of images that an inferencer was given in colour; leaves grey ones as they are.
    dict(type='RandomGrayscale', prob=1.0, channel_weights=(1, 2, 1)),
    dict(type='Resize', scale=32, interpolation='bilinear'),
    dict(type='PackInputs'),
]

# 1,198 images of a few hundred bytes: worker processes would cost more than they
# save.
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type=dataset_type,
        data_root='data/digits',
        data_prefix='train',
        pipeline=train_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
    drop_last=True,
)

val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        type=dataset_type,
        data_root='data/digits',
        data_prefix='test',
        pipeline=test_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
