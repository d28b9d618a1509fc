# MDEQ-large's CIFAR-10 schedule.
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3, weight_decay=0.0))

# The learning rate follows the cosine by iteration, not by epoch.
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=220,
    eta_min=1e-6,
    by_epoch=True,
    begin=0,
    end=220,
    convert_to_iter_based=True,
)

train_cfg = dict(by_epoch=True, max_epochs=220, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# base_batch_size = (4 GPUs) x (32 samples per GPU)
auto_scale_lr = dict(base_batch_size=128)
