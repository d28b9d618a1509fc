"""Small image folders of one folder a class, for tests that train for real."""

from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits

CIFAR10 = (
    'airplane automobile bird cat deer dog frog horse ship truck'  # in this order
).split()
# As many as ImageNet-1k has; mmpretrain's data set insists on the number.
IMAGENET = [f'n{i:08d}' for i in range(1000)]


def write_class_folder(root, classes, splits, size):
    """Write handwritten digits to ``root/<split>/<class>/``.

    The images go to the first classes, one each in turn; the other class folders
    stay empty.

    Args:
        root (Path): Where to.
        classes (Sequence[str]): Names of the class folders.
        splits (dict[str, int]): Number of images of each split.
        size (int): Side of the images in pixels.

    Returns:
        Path: ``root``.
    """
    digits = iter(load_digits().images)
    for split, number in splits.items():
        for name in classes:
            (Path(root) / split / name).mkdir(parents=True)
        for i in range(number):
            gray = (next(digits) * 15).astype(np.uint8)
            image = cv2.resize(gray, (size, size), interpolation=cv2.INTER_LINEAR)
            path = Path(root) / split / classes[i % len(classes)] / f'{i}.jpg'
            assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    return Path(root)
