# MDEQ-tiny's CIFAR-10 schedule.
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3, weight_decay=2.5e-6))

# The learning rate follows the cosine by iteration, not by epoch.
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=50,
    eta_min=1e-6,
    by_epoch=True,
    begin=0,
    end=50,
    convert_to_iter_based=True,
)

train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# base_batch_size = (2 GPUs) x (64 samples per GPU)
auto_scale_lr = dict(base_batch_size=128)
