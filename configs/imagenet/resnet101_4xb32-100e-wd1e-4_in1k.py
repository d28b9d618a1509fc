_base_ = [
    '../_base_/models/resnet101.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs128_100e_wd1e-4.py',
    '../_base_/default_runtime.py',
]
