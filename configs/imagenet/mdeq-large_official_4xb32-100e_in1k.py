# The official stopping rule: an absolute residual of 1e-3, which is so small
# that a solve practically always runs to its limit. It holds for the forward
# solve alone: the backward solve works on an incoming gradient scaled to unit
# norm per sample and is always relative.
_base_ = './mdeq-large_4xb32-100e_in1k.py'

model = dict(backbone=dict(solver=dict(norm='abs')))
