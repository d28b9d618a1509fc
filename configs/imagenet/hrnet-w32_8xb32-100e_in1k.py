_base_ = [
    '../_base_/models/hrnet-w32.py',
    '../_base_/datasets/imagenet_bs32.py',
    '../_base_/schedules/imagenet_bs256_100e_wd1e-4.py',
    '../_base_/default_runtime.py',
]
