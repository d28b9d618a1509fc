"""Image folders in the layouts that the configs read."""

import pytest

from tests.image_folders import CIFAR10, IMAGENET, write_class_folder


@pytest.fixture(scope='session')
def imagenet_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('imagenet')
    return write_class_folder(root, IMAGENET, dict(train=4, val=3), size=64)


@pytest.fixture(scope='session')
def cifar10_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('cifar10')
    return write_class_folder(root, CIFAR10, dict(train=4, test=3), size=32)
