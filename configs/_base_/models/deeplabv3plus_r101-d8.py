_base_ = './deeplabv3plus_r50-d8.py'

# model settings
model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint='open-mmlab://resnet101_v1c'))
)
