# A small MDEQ from scratch, 4.2 M parameters, for a short budget on a CPU. It shows
# that training works, not how well it ends. Another length takes these values on the
# command line:
#   --cfg-options train_cfg.max_iters=2800 train_cfg.val_interval=700
#   param_scheduler.1.T_max=2700 param_scheduler.1.end=2800
#   default_hooks.checkpoint.interval=700
_base_ = [
    '../_base_/models/fcn_mdeq_small.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/schedules/camvid_short.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(160, 224)),
    backbone=dict(
        arch=dict(_delete_=True, channels=(24, 48, 96, 192), num_groups=8, expansion=4),
        drop_rate=0.0,
        # The plain iteration, which the gradient goes on with.
        solver=dict(_delete_=True, type='PicardSolver', max_steps=4, tol=0),
        gradient=dict(_delete_=True, type='PhantomGradient', steps=3, unroll=True),
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=(24, 48, 96, 192),
        channels=360,
        num_classes=11,
        loss_decode=dict(_delete_=True, type='CrossEntropyLoss', avg_non_ignore=True),
    ),
)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=350, max_keep_ckpts=2, save_best='mIoU'),
    monitor=dict(type='EquilibriumMonitorHook', interval=20),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper', optimizer=dict(lr=3e-3))
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
tta_model = dict(type='ImplicitSegTTAModel')
randomness = dict(seed=0)
