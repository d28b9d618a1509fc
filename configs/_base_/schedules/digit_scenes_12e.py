# Gradients are clipped and the second moments of the optimiser short, because the
# whole training is 1,200 steps.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=8e-3, betas=(0.9, 0.99), weight_decay=0.01),
    clip_grad=dict(max_norm=2.0),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.02,
        by_epoch=True,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=11,
        eta_min=1e-6,
        by_epoch=True,
        begin=1,
        end=12,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=2)
val_cfg = dict()
test_cfg = dict()

# base_batch_size = (1 CPU) x (16 samples)
auto_scale_lr = dict(base_batch_size=16)
