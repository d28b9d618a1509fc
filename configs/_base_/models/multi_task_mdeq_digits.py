# The MDEQ of the digit scenes, with the head of the digits beside its own. Both see
# three branches, of 8x8 pixels and less for a digit, 16x16 and less for a scene.
_base_ = './mdeq_digit_scenes.py'

model = dict(
    type='MultiTaskMDEQ',
    data_preprocessor=dict(
        _delete_=True,
        type='MultiTaskDataPreprocessor',
        cls=dict(
            type='ClsDataPreprocessor',
            num_classes=10,
            mean=[77.8],
            std=[95.9],
            to_rgb=False,
        ),
        seg={{_base_.data_preprocessor}},
    ),
    neck=dict(type='MDEQPoolBranches', in_channels={{_base_.channels}}),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=96,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
    # Digits are the easier task: at equal weights the scenes lose 11 points of mIoU.
    loss_weights=dict(cls=0.2, seg=1.0),
)
