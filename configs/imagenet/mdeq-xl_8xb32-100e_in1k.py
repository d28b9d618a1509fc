_base_ = [
    '../_base_/models/mdeq_xl.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs256_100e_wd1e-4.py',
    '../_base_/default_runtime.py',
]

# Training starts with 4 unrolled steps of f: at random initialisation the
# equilibrium is not found, and its implicit gradient means nothing.
# They take the same share of the training as for the smaller models: half of
# their 510,000 iterations, since a batch is twice as large.
default_hooks = dict(
    warmup=dict(type='UnrollWarmupHook', unroll_steps=4, end=255000, by_epoch=False),
    monitor=dict(type='EquilibriumMonitorHook'),
)

# Drops steps that would make weights non-finite, and warns of failed solves.
optim_wrapper = dict(type='EquilibriumOptimWrapper')
# How the solves ended, beside the results.
val_evaluator = [{{_base_.val_evaluator}}, dict(type='EquilibriumMetric')]
test_evaluator = val_evaluator
