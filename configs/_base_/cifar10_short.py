# Data, schedule and runtime of a short training on CIFAR-10 for a CPU: 400
# iterations of 64 images, which is half an epoch, without augmentation.
_base_ = ['./datasets/cifar10_bs64_noaug.py', './default_runtime.py']

train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))

optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3, weight_decay=2.5e-6))
param_scheduler = dict(
    type='CosineAnnealingLR', T_max=400, eta_min=1e-6, by_epoch=False
)
train_cfg = dict(by_epoch=False, max_iters=400, val_interval=400)
val_cfg = dict()
test_cfg = dict()

log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=2),
)

# base_batch_size = (1 GPU or CPU) x (64 samples)
auto_scale_lr = dict(base_batch_size=64)
