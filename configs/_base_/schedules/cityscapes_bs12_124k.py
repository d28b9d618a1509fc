# The schedule of MDEQ-small, and with another weight decay of MDEQ-large.
# 500 epochs of the 2,975 images in batches of 12: 500 x 248 iterations.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=2e-4),
)

param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=124000,
    eta_min=1e-6,
    by_epoch=False,
    begin=0,
    end=124000,
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=124000, val_interval=4000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# base_batch_size = (4 GPUs) x (3 samples per GPU)
auto_scale_lr = dict(base_batch_size=12)
