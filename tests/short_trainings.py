"""Tiny data sets in the place of all real ones, and configs that train on them for two
iterations.
"""

from pathlib import Path

import cv2
import numpy as np

from tests.cityscapes_folder import write_cityscapes
from tests.image_folders import CIFAR10, IMAGENET, write_class_folder

# Sides of images, crops and strides, of which the larger ones take a CPU too long.
SMALLER = {
    224: 64,
    256: 72,
    (2048, 1024): (128, 64),
    (512, 1024): (32, 64),
    (768, 1024): (48, 64),
    (480, 360): (120, 90),
    (360, 480): (80, 112),
    (341, 683): (21, 42),
}
SIZES = ('scale', 'crop_size', 'size', 'stride')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def write_data_sets(root):
    """Write a tiny data set for each real one that the configs name.

    Args:
        root (Path): Stands for ``data/``.

    Returns:
        Path: ``root``.
    """
    write_class_folder(root / 'imagenet', IMAGENET, dict(train=4, val=2), size=72)
    write_class_folder(root / 'cifar10', CIFAR10, dict(train=4, test=2), size=32)
    names = [str(i) for i in range(10)]
    write_class_folder(root / 'digits', names, dict(train=4, test=2), size=32)
    write_cityscapes(root / 'cityscapes', dict(train=4, val=1))
    rng = np.random.default_rng(0)
    for name, size, suffix in (
        ('camvid', (90, 120), 'jpg'),
        ('digit_scenes', (64, 64), 'png'),
    ):
        for split, number in (('train', 4), ('val', 1), ('test', 1)):
            for i in range(number):
                labels = rng.integers(0, 11, size, np.uint8)
                _write(root / name / 'annotations' / split / f'{i}.png', labels)
                image = np.stack([labels * 20] * 3, axis=2)
                _write(root / name / 'images' / split / f'{i}.{suffix}', image)
    return root


def _write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def shrink(node, roots=None):
    """Replace sizes, and folders of data, wherever they stand in a config.

    Args:
        node: Any part of a config.
        roots (Path, optional): Stands for ``data/``. Default: that stays.
    """
    if isinstance(node, list | tuple):
        for part in node:
            shrink(part, roots)
        return
    if not isinstance(node, dict):
        return
    if roots is not None and str(node.get('data_root', '')).startswith('data/'):
        node['data_root'] = str(roots / Path(node['data_root']).name)
    for key, value in node.items():
        small = SMALLER.get(tuple(value) if isinstance(value, list) else value) if (
            key in SIZES and isinstance(value, int | list | tuple)
        ) else None  # fmt: skip
        if small is not None:
            node[key] = small
        else:
            shrink(value, roots)


def counts_epochs(cfg):
    """Whether a training is as long as a number of epochs."""
    return bool(cfg.train_cfg.get('by_epoch') or 'max_epochs' in cfg.train_cfg)


def shorten(cfg, roots=None):
    """Shorten a training to two iterations of two small images, or to one epoch.

    The first iteration is unrolled and the second solves, where the config has the
    hook for it.

    Args:
        cfg (Config): Changed in place.
        roots (Path, optional): Stands for ``data/``. Default: that stays.
    """
    for field in (*LOADERS, 'model', 'data_preprocessor', 'tta_pipeline'):
        shrink(cfg.get(field), roots)
    for field in LOADERS:
        if cfg.get(field) is not None:
            cfg[field].update(num_workers=0, persistent_workers=False, batch_size=2)
    if cfg.get('train_cfg') is None:
        return
    if counts_epochs(cfg):
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
    else:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    hooks = cfg.get('default_hooks') or {}
    if 'warmup' in hooks:
        hooks['warmup'].update(by_epoch=False, end=1)
    if 'jacobian' in hooks:
        hooks['jacobian'].update(frequency=1.0)
