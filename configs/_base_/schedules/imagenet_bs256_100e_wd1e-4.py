# MDEQ's ImageNet schedule for MDEQ-XL: the learning rate of half the batch.
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
)

# The learning rate follows the cosine by iteration, not by epoch.
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=100,
    eta_min=1e-6,
    by_epoch=True,
    begin=0,
    end=100,
    convert_to_iter_based=True,
)

train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# base_batch_size = (8 GPUs) x (32 samples per GPU)
auto_scale_lr = dict(base_batch_size=256)
