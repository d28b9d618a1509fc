# The schedule of MDEQ-XL.
# 500 epochs of the 2,975 images in batches of 16: 500 x 186 iterations.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=3e-4),
)

param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=93000,
    eta_min=1e-6,
    by_epoch=False,
    begin=0,
    end=93000,
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=93000, val_interval=3000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# base_batch_size = (8 GPUs) x (2 samples per GPU)
auto_scale_lr = dict(base_batch_size=16)
