# A small MDEQ for one core of a CPU. All but the last five epochs apply f twice instead
# of solving, which takes half the time (docs/learning.md has the price).
_base_ = [
    '../_base_/models/mdeq_mini_cifar.py',
    '../_base_/datasets/cifar10_bs32.py',
    '../_base_/schedules/cifar10_bs128_22e.py',
    '../_base_/default_runtime.py',
]

train_dataloader = dict(batch_size=128, num_workers=1)
val_dataloader = dict(batch_size=128, num_workers=1)
test_dataloader = dict(batch_size=128, num_workers=1)

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=2),
    warmup=dict(type='UnrollWarmupHook', unroll_steps=2, end=17, by_epoch=True),
    monitor=dict(type='EquilibriumMonitorHook', interval=50),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
randomness = dict(seed=0)
