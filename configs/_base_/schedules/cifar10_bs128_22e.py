# 22 epochs of 128 images, for a model of 0.2 M parameters on one core of a CPU. The
# learning rate stays where it is for 12 epochs, so that a longer training run can go on
# from any checkpoint before that.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.02),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='LinearLR',
        start_factor=1.0,
        end_factor=0.001,
        by_epoch=True,
        begin=12,
        end=22,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=22, val_interval=2)
val_cfg = dict()
test_cfg = dict()

# base_batch_size = (1 GPU or CPU) x (128 samples)
auto_scale_lr = dict(base_batch_size=128)
