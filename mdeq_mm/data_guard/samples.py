"""Whether a sample of a data set can be trained on."""

import operator
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .findings import Problem
from .images import check_local_image, is_dark_of_sixteen_bits
from .label_maps import Labels, check_label_map

# Images of 16 bits that are decoded, of each data set and process.
_SIXTEEN_BITS = 100


@dataclass
class _Result:
    label_maps: int = 0
    images: int = 0
    problems: list = field(default_factory=list)
    classes: Counter = field(default_factory=Counter)


class SampleCheck:
    """Tells whether samples of a data set can be used.

    Args:
        dataset (Dataset): A data set that is no wrapper.
        name (str): How a config names it.
        decode (bool): As for :func:`examine`, and the others.

    Attributes:
        samples (bool): Whether there is anything to look at.
        dark (list[str]): As of :class:`Findings`.
    """

    def __init__(self, dataset, name, decode=True, images=True, ignored=None,
                 outputs=None):  # fmt: skip
        self.dataset, self.name, self.images = dataset, name, images
        self.samples = hasattr(dataset, 'get_data_info') and hasattr(
            dataset, 'pipeline'
        )
        loaders = {type(s).__name__: s for s in steps(getattr(dataset, 'pipeline', ()))}
        self.maps = 'LoadAnnotations' in loaders
        # Images of other kinds, such as of many channels, are not looked at.
        self.loader = loaders.get('LoadImageFromFile')
        self.local = self.loader is not None and _is_local(self.loader)
        self.labels = Labels(dataset, ignored) if self.maps and decode else None
        classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
        # The classes of label maps are no labels of images.
        self.outputs = outputs or (0 if self.maps else len(classes))
        self.backend = getattr(dataset, 'backend_args', None)
        self.dark, self.sixteen = [], 0

    def info(self, index):
        """dict: The sample itself, whatever stands in for it."""
        read = self.dataset.get_data_info
        return getattr(read, 'original', read)(index)

    def run(self, indices):
        """Look at some of the samples."""
        result = _Result()
        for index in indices:
            info = self.info(index)
            problem = self.problem(index, info, result)
            if problem is not None:
                result.problems.append(problem)
        return result

    def problem(self, index, info, result=None, whole=False):
        """What is wrong with a sample.

        Args:
            index (int): Its place.
            info (dict): What the data set has of it.
            result (_Result, optional): Where to count.
            whole (bool): Whether to decode the image, too.

        Returns:
            Problem: None if nothing is.
        """
        result = result or _Result()
        try:
            self._look(index, info, result, whole)
        except (OSError, ValueError) as error:
            path = str(info.get('img_path', f'sample {index}'))
            missing = isinstance(error, FileNotFoundError)
            return Problem(self.name, index, path, str(error), missing)
        return None

    def _look(self, index, info, result, whole):
        if 'gt_label' in info:
            self._check_label(index, info, result)
        path = info.get('img_path')
        if self.maps and info.get('seg_map_path'):
            result.label_maps += 1
            check_label_map(
                info, self.labels, self.backend, self.loader, result.classes
            )
        elif self.local and (self.images or whole):
            # Several images a sample, or files that are elsewhere.
            if not isinstance(path, str | os.PathLike) or '://' in str(path):
                return
            result.images += 1
            whole = whole or self.images == 'whole'
            if check_local_image(path, self.loader, whole):
                self._look_at_sixteen_bits(path)

    def _check_label(self, index, info, result):
        given = info['gt_label']
        if isinstance(given, dict):
            # One a task: whoever defines them knows what they are.
            return
        several = not isinstance(given, int | np.integer)
        for label in np.asarray(given).reshape(-1).tolist() if several else (given,):
            try:
                sound = 0 <= operator.index(label) < (self.outputs or float('inf'))
            except TypeError:
                sound = False
            if not sound:
                source = getattr(self.dataset, 'ann_file', '') or 'the data set'
                known = (
                    f'0 to {self.outputs - 1}' if self.outputs else 'integers from 0'
                )
                raise ValueError(
                    f'{info.get("img_path", f"sample {index} of {self.name}")} has '
                    f'gt_label={given!r}, but labels are {known}: correct it in '
                    f'{source}, or num_classes of the head'
                )
            result.classes[label] += 1

    def _look_at_sixteen_bits(self, path):
        kind = getattr(self.loader, 'color_type', None)
        if kind in ('color', 'grayscale') and self.sixteen < _SIXTEEN_BITS:
            self.sixteen += 1
            if is_dark_of_sixteen_bits(path):
                self.dark.append(path)


def steps(step):
    """Transforms of a pipeline, those inside of others included."""
    if isinstance(step, list | tuple):
        inner = step
    else:
        inner = getattr(step, 'transforms', None) or getattr(step, 'subroutines', ())
        yield step
    for part in inner:
        yield from steps(part)


def _is_local(loader):
    """Whether what a transform loads are files of this machine that have to be."""
    if loader.ignore_empty or getattr(loader, 'file_client_args', None):
        return False
    backend = (loader.backend_args or {}).get('backend', 'local')
    return backend in ('local', 'LocalBackend')
