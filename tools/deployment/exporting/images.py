"""Images to compare a file and its model on."""

import inspect
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch.nn.functional import interpolate

from mdeq_mm.apis.inference import first_test_dataset, load_image
from mdeq_mm.deployment.model import image_preprocessor
from mdeq_mm.registry import name_of

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def dataset_class(cfg):
    """The class of the test data set."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    # Unlike get(), this imports what the toolbox registers.
    dataset = first_test_dataset(cfg)
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        kind = dataset['type']
        return registry.get(kind) if isinstance(kind, str) else kind


def size_of(cfg):
    """Height and width that the test pipeline ends with, or None where it is open."""
    found = None
    for step in (first_test_dataset(cfg) or {}).get('pipeline', []):
        name = name_of(step['type'])
        size = step.get('crop_size' if name.endswith('Crop') else 'scale')
        if name in ('CenterCrop', 'Resize') and size is not None:
            # mmcv gives width and height.
            found = (size, size) if isinstance(size, int) else tuple(size)[::-1]
    if found is None:
        preprocessor = cfg.get('model', {}).get('data_preprocessor') or {}
        found = preprocessor.get('size')
    return None if found is None else tuple(found)


def find_images(cfg, model, shape, count, folder=None):
    """Normalised images of one size.

    Args:
        cfg (Config): With the test pipeline.
        model (nn.Module): With the data preprocessor.
        shape (Sequence[int]): Channels, height and width.
        count (int): How many at most.
        folder (str, optional): Where from. Default: the test set where it is there,
            random numbers where not.

    Returns:
        tuple[Tensor, str]: Images (N, C, H, W), and what they are, in words.

    Raises:
        OSError: If the folder is not there.
        ValueError: If it has no images, or they have other channels.
    """
    if folder is not None:
        paths = sorted(Path(folder).iterdir())
        paths = [p for p in paths if p.suffix.lower() in SUFFIXES]
        if not paths:
            raise ValueError(f'{folder!r} has no images ({", ".join(SUFFIXES)})')
        batches = [load_image(cfg, path) for path in _spread(paths, count)]
        words = f'of {folder}'
    else:
        batches = _of_dataset(cfg, count)
        words = 'of the test set'
    if not batches:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, *shape, generator=generator)
        return images, f'{count} random images, for no test set is there'
    images = [_prepared(batch, model, shape) for batch in batches]
    return torch.cat(images), f'{len(images)} images {words}'


def _spread(items, count):
    """Some of a list, from all over it."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _of_dataset(cfg, count):
    """Batches of one image of the test set; empty where it cannot be read."""
    settings = deepcopy(first_test_dataset(cfg))
    if not settings:
        return []
    try:
        if 'download' in inspect.signature(dataset_class(cfg)).parameters:
            settings['download'] = False
        dataset = DATASETS.build(settings)
        rows = _spread(range(len(dataset)), count)
        return [pseudo_collate([dataset[i]]) for i in rows]
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError):
        # Not there, or incomplete.
        return []


def _prepared(batch, model, shape):
    """One image through the data preprocessor, at a given size."""
    inputs = [image.cpu() for image in batch['inputs']]
    batch = dict(inputs=inputs, data_samples=batch.get('data_samples'))
    images = image_preprocessor(model)(batch, False)['inputs'].cpu().float()
    if images.shape[1] != shape[0]:
        raise ValueError(
            f'images of {images.shape[1]} channels do not fit the model, which takes '
            f'{shape[0]}'
        )
    if images.shape[2:] != tuple(shape[1:]):
        images = interpolate(images, tuple(shape[1:]), mode='bilinear')
    return images
