_base_ = './fcn_hr18.py'

# model settings
model = dict(
    backbone=dict(
        extra=dict(
            stage1=dict(num_blocks=(2,)),
            stage2=dict(num_blocks=(2, 2)),
            stage3=dict(num_modules=3, num_blocks=(2, 2, 2)),
            stage4=dict(num_modules=2, num_blocks=(2, 2, 2, 2)),
        ),
        init_cfg=dict(checkpoint='open-mmlab://msra/hrnetv2_w18_small'),
    )
)
