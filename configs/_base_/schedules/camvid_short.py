# For about half an hour on one core of a CPU.
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01)
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=1300,
        eta_min=1e-6,
        by_epoch=False,
        begin=100,
        end=1400,
    ),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=1400, val_interval=350)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# base_batch_size = (1 CPU) x (4 samples)
auto_scale_lr = dict(enable=False, base_batch_size=4)
