optim_wrapper = dict(optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01))

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.05,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=25,
        eta_min=1e-6,
        by_epoch=True,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=3)
val_cfg = dict()
test_cfg = dict()

# base_batch_size = (1 CPU) x (64 samples)
auto_scale_lr = dict(base_batch_size=64)
