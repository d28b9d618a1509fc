"""Small models and images for tests of exported files."""

import pytest
import torch

from tests.helpers import build, build_segmentor, segmentor_config

#: Two branches of 8 channels: little to trace.
ARCH = dict(channels=(8, 8), num_groups=4, expansion=1, downsample_times=1)


def small_classifier(**backbone):
    """A classifier of 10 classes for grey images, with random weights."""
    model = dict(
        type='ImplicitImageClassifier',
        data_preprocessor=dict(
            type='ClsDataPreprocessor', mean=[77.8], std=[95.9], to_rgb=False
        ),
        backbone=dict(type='MDEQ', arch=ARCH, in_channels=1) | backbone,
        neck=[
            dict(
                type='MDEQFuseScales',
                in_channels=(8, 8),
                head_channels=(2, 2),
                out_channels=16,
            ),
            dict(type='GlobalAveragePooling'),
        ],
        head=dict(type='LinearClsHead', num_classes=10, in_channels=16),
    )
    return build(model).eval()


def small_segmentor(**backbone):
    """A segmentor of 3 classes for grey images, with random weights."""
    config = segmentor_config((8, 8), 3, arch=ARCH, in_channels=1, **backbone)
    return build_segmentor(config).eval()


def digits(count, size):
    """Real digits of scikit-learn, normalised, (count, 1, *size)."""
    pytest.importorskip('sklearn', reason='scikit-learn is not installed')
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[:count]).float()[:, None]
    images = torch.nn.functional.interpolate(images, size, mode='bilinear')
    return (16 * images - 77.8) / 95.9
