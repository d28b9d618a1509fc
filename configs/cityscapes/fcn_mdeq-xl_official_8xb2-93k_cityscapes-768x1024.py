# The official stopping rule: an absolute residual of 1e-3, which is so small
# that a solve practically always runs to its limit. It holds for the forward
# solve alone: the backward solve works on an incoming gradient scaled to unit
# norm per sample and is always relative.
_base_ = './fcn_mdeq-xl_8xb2-93k_cityscapes-768x1024.py'

model = dict(backbone=dict(solver=dict(norm='abs')))
