"""Whether the label maps of a segmentation data set fit."""

import numpy as np
from mmengine import fileio
from PIL import Image

from .images import reading, size_of


class Labels:
    """Labels that the files of a data set may hold.

    Args:
        dataset (BaseSegDataset): The data set.
        ignored (Collection[int], optional): Labels that the model ignores. Default:
            the data set's ``ignore_index``.
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
        self.chosen = getattr(dataset, 'label_map', None) or {}
        self.first, self.last = first, first + count - 1
        self.others = sorted(others)

    def __str__(self):
        said = f'{self.first} to {self.last}'
        if self.others:
            others = ' or '.join(map(str, self.others))
            said += f', or {others} for pixels to ignore'
        return said

    def stray(self, image, classes):
        """The first label that is none of these, and its number of pixels.

        Args:
            image (PIL.Image.Image): A label map.
            classes (Counter): Takes 1 for each class that has a pixel in it.
        """
        if image.mode in ('L', 'P'):
            counts = np.array(image.histogram())
            values = counts.nonzero()[0]
            counts = counts[values]
        else:
            values, counts = np.unique(np.asarray(image), return_counts=True)
        bad = (values < self.first) | (values > self.last)
        bad &= ~np.isin(values, self.others)
        for value in values[~np.isin(values, self.others)].tolist():
            classes[self.chosen.get(value, value - self.first)] += 1
        if not self.known or not bad.any():
            return None, 0
        return values[bad][0], counts[bad][0]


def check_label_map(info, labels, backend, loader, classes):
    """Check one label map.

    Args:
        info (dict): The sample, as the data set gives it to its pipeline.
        labels (Labels, optional): What it may hold; None: any.
        backend (dict, optional): ``backend_args`` of the data set.
        loader (LoadImageFromFile, optional): What loads its image; None for images
            of other kinds, such as of many channels, which are not looked at.
        classes (Counter): Takes 1 for each class that has a pixel in it.

    Raises:
        FileNotFoundError: If the image or the label map is missing.
        ValueError: If one of them is damaged, or they do not fit.
    """
    image, path = info['img_path'], info['seg_map_path']
    size = None if loader is None else size_of(image, backend, loader)
    remedy = (
        f'it is the label map of {image}; check data_prefix.seg_map_path and '
        'seg_map_suffix, or add the file'
    )
    label = None
    with (
        reading(path, remedy),
        fileio.get_local_path(path, backend) as local,
        Image.open(local) as label_map,
    ):
        found, channels = label_map.size, len(label_map.getbands())
        if labels is not None and channels == 1:
            label, pixels = labels.stray(label_map, classes)
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
