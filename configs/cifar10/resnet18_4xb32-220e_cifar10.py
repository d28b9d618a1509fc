_base_ = [
    '../_base_/models/resnet18_cifar.py',
    '../_base_/datasets/cifar10_bs32.py',
    '../_base_/schedules/cifar10_bs128_220e.py',
    '../_base_/default_runtime.py',
]
