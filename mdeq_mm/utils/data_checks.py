"""Checks of segmentation data sets before hours are spent on them."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from mmengine import fileio
from PIL import Image, UnidentifiedImageError

# Where EXIF says which way up a photograph is; values that swap its sides.
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
# What files of a format end with, so that half a file is told from its last bytes.
_ENDS = dict(PNG=b'IEND', JPEG=b'\xff\xd9')


def leaves(dataset, name='dataset'):
    """Data sets inside of wrappers such as ``ConcatDataset``.

    Args:
        dataset (Dataset): A data set or a wrapper of some.
        name (str): How a config names it.

    Yields:
        tuple[str, Dataset]: Name and data set.
    """
    inner = getattr(dataset, 'datasets', None)
    if isinstance(inner, dict):
        for key, part in inner.items():
            yield from leaves(part, f'{name}.datasets.{key}')
    elif inner is not None:
        for i, part in enumerate(inner):
            yield from leaves(part, f'{name}.datasets[{i}]')
    elif hasattr(dataset, 'dataset'):
        yield from leaves(dataset.dataset, f'{name}.dataset')
    else:
        yield name, dataset


def check_dataset(dataset, name, decode=True, workers=None, ignored=None, share=(0, 1)):
    """Check that a data set has samples, and that label maps fit.

    A label map has to be there, of the size of its image, and hold labels of the
    data set's classes or the one to ignore alone. Data sets whose pipelines read no
    label maps are only counted.

    Args:
        dataset (Dataset): The data set; wrappers are looked into.
        name (str): How the config names it, for messages.
        decode (bool): Whether to read all labels, not only their sizes.
        workers (int, optional): Threads. Default: as many as there are cores, 8 at
            most.
        ignored (Collection[int], optional): Labels that the model ignores. Default:
            the data set's ``ignore_index``.
        share (tuple[int, int]): Rank and number of the processes that check a share
            of the files each.

    Returns:
        int: Number of label maps that were checked.

    Raises:
        FileNotFoundError: If an image or label map is missing.
        ValueError: If a data set is empty, a file is damaged, or a label map does
            not fit.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    rank, processes = share
    checked = 0
    for path, part in leaves(dataset, name):
        _check_has_samples(part, path)
        loaders = set(_loaders(getattr(part, 'pipeline', None)))
        if 'LoadAnnotations' not in loaders:
            continue
        infos = [part.get_data_info(i) for i in range(rank, len(part), processes)]
        infos = [info for info in infos if info.get('seg_map_path')]
        labels = _Labels(part, ignored) if decode else None
        backend = getattr(part, 'backend_args', None)

        def check(
            info,
            labels=labels,
            backend=backend,
            # Images of other kinds, such as of many channels, are not looked at.
            sized='LoadImageFromFile' in loaders,
        ):
            _check_label_map(info, labels, backend, sized)

        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(check, infos):
                checked += 1
    return checked


def _check_has_samples(dataset, name):
    if not hasattr(dataset, '__len__') or len(dataset) > 0:
        return
    said = f'{name} ({type(dataset).__name__}) has no samples'
    if getattr(dataset, 'data_prefix', None):
        said += (
            f': it finds no images in data_root={getattr(dataset, "data_root", None)!r}'
            f' with data_prefix={dict(dataset.data_prefix)}'
        )
        if hasattr(dataset, 'img_suffix'):
            said += f' that end in {dataset.img_suffix!r}'
    raise ValueError(
        f'{said}; correct data_root and data_prefix, and the suffix of the images'
    )


def _loaders(step):
    """Names of the transforms of a pipeline, those inside of others included."""
    if isinstance(step, list | tuple):
        inner = step
    else:
        inner = getattr(step, 'transforms', None) or getattr(step, 'subroutines', ())
        yield type(step).__name__
    for part in inner:
        yield from _loaders(part)


class _Labels:
    """Labels that the files of a data set may hold.

    Args:
        dataset (BaseSegDataset): The data set.
        ignored (Collection[int], optional): As for :func:`check_dataset`.
    """

    def __init__(self, dataset, ignored=None):
        count = len(dataset.metainfo.get('classes') or ())
        if getattr(dataset, 'label_map', None):
            # Files hold the labels of all classes, of which some were chosen.
            count = max(dataset.label_map) + 1
        if ignored is None:
            ignored = [getattr(dataset, 'ignore_index', 255)]
        first, others = 0, set(ignored)
        if getattr(dataset, 'reduce_zero_label', False):
            first, others = 1, others | {0}
        self.known = count > 0
        self.first, self.last = first, first + count - 1
        self.others = sorted(others)

    def __str__(self):
        said = f'{self.first} to {self.last}'
        if self.others:
            others = ' or '.join(map(str, self.others))
            said += f', or {others} for pixels to ignore'
        return said

    def stray(self, image):
        """The first label that is none of these, and its number of pixels."""
        if image.mode in ('L', 'P'):
            counts = np.array(image.histogram())
            values = counts.nonzero()[0]
            counts = counts[values]
        else:
            values, counts = np.unique(np.asarray(image), return_counts=True)
        bad = (values < self.first) | (values > self.last)
        bad &= ~np.isin(values, self.others)
        if not self.known or not bad.any():
            return None, 0
        return values[bad][0], counts[bad][0]


@contextmanager
def _reading(path, remedy):
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{path} does not exist: {remedy}') from error
    except Exception as error:
        reason = 'it is of no known format'
        if not isinstance(error, UnidentifiedImageError):
            reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise ValueError(
            f'{path} cannot be read as an image ({reason}): replace the file'
        ) from error


def _size_of(path, backend):
    """Width and height of an image as it is loaded; its end has to be there."""
    remedy = 'check ann_file and data_prefix.img_path'
    with (
        _reading(path, remedy),
        fileio.get_local_path(path, backend_args=backend) as local,
        Image.open(local) as image,
    ):
        width, height = image.size
        if image.format == 'JPEG' and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
            # OpenCV turns it.
            width, height = height, width
        with open(local, 'rb') as file:
            file.seek(max(0, os.path.getsize(local) - 1024))
            if _ENDS.get(image.format, b'') not in file.read():
                # Something may have been appended to a whole file.
                image.load()
    return width, height


def _check_label_map(info, labels, backend, sized):
    image, path = info['img_path'], info['seg_map_path']
    size = _size_of(image, backend) if sized else None
    remedy = (
        f'it is the label map of {image}; check data_prefix.seg_map_path and '
        'seg_map_suffix, or add the file'
    )
    label = None
    with (
        _reading(path, remedy),
        fileio.get_local_path(path, backend_args=backend) as local,
        Image.open(local) as label_map,
    ):
        found, channels = label_map.size, len(label_map.getbands())
        if labels is not None and channels == 1:
            label, pixels = labels.stray(label_map)
    if channels > 1:
        raise ValueError(
            f'{path} has {channels} channels, and a label map has one: write the label '
            'of each pixel, not its colour'
        )
    if size not in (None, found):
        raise ValueError(
            f'{path} has {found[0]}x{found[1]} pixels and its image {image} has '
            f'{size[0]}x{size[1]}: make the label map of the size of the image'
        )
    if label is not None:
        raise ValueError(
            f'{path} holds the label {label} in {pixels} of its pixels, but labels are '
            f'{labels}: convert the labels, or correct metainfo.classes'
        )
