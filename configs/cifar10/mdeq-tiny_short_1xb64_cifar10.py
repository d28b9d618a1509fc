# MDEQ-tiny on CIFAR-10 for a short budget on a CPU: 400 iterations, of which the
# first half is unrolled and the second half implicit, then one evaluation on all
# test images. It shows that training works, not how well it ends. Another length
# takes four values on the command line:
#   --cfg-options train_cfg.max_iters=800 train_cfg.val_interval=800
#   param_scheduler.T_max=800 default_hooks.warmup.end=400
_base_ = './mdeq-tiny_2xb64-50e_cifar10.py'

train_cfg = dict(_delete_=True, by_epoch=False, max_iters=400, val_interval=400)
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', T_max=400, eta_min=1e-6, by_epoch=False
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler', shuffle=True))

log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=2),
    warmup=dict(end=200),
)

# base_batch_size = (1 GPU or CPU) x (64 samples)
auto_scale_lr = dict(base_batch_size=64)
