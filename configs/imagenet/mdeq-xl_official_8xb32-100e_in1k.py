# The official stopping rule: an absolute residual of 1e-3, which is so small
# that a solve practically always runs to its limit. It holds for the forward
# solve alone: the backward solve works on an incoming gradient scaled to unit
# norm per sample and is always relative.
_base_ = './mdeq-xl_8xb32-100e_in1k.py'

model = dict(backbone=dict(solver=dict(norm='abs')))

# The published number. 100 epochs of batches of 256 have 500,500 iterations, so
# that the training stays unrolled to the end.
default_hooks = dict(warmup=dict(end=510000))
