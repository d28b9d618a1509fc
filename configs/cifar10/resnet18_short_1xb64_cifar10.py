# ResNet-18 with the data and schedule of the short MDEQs.
_base_ = ['../_base_/models/resnet18_cifar.py', '../_base_/cifar10_short.py']
