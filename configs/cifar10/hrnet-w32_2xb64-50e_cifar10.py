_base_ = [
    '../_base_/models/hrnet-w32_cifar.py',
    '../_base_/datasets/cifar10_bs64_noaug.py',
    '../_base_/schedules/cifar10_bs128_50e.py',
    '../_base_/default_runtime.py',
]
