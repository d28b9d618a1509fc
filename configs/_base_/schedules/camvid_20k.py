optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01)
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(
        type='CosineAnnealingLR',
        T_max=19500,
        eta_min=1e-6,
        by_epoch=False,
        begin=500,
        end=20000,
    ),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=20000, val_interval=2000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# base_batch_size = (1 GPU) x (8 samples)
auto_scale_lr = dict(enable=False, base_batch_size=8)
