"""A folder with the layout and the names of Cityscapes, for tests that train."""

from pathlib import Path

import cv2
import numpy as np

CITIES = dict(train=('aachen', 'bochum'), val=('frankfurt',))
# Road, sidewalk, building, vegetation and sky fill an image as bands, from the top
# to these shares of its height.
BANDS = ((10, 0.2), (2, 0.4), (8, 0.5), (1, 0.6), (0, 1.0))
CLASSES = 19
IGNORED = 255


def write_cityscapes(root, splits=dict(train=3, val=2), size=(128, 64)):  # noqa: B006
    """Write pictures that look a little like streets, and their label maps.

    Each picture has bands from sky to road with an object of every other class in
    front of them, and the car's own bonnet, which is ignored, at the bottom. A class
    has one colour, plus noise.

    Args:
        root (Path): Where to.
        splits (dict[str, int]): Number of images of ``train`` and ``val``.
        size (tuple[int, int]): Width and height in pixels.

    Returns:
        Path: ``root``.
    """
    rng = np.random.default_rng(0)
    colors = rng.integers(30, 225, (256, 3))
    for split, number in splits.items():
        for i in range(number):
            labels = _street(rng, *size)
            image = colors[labels] + rng.integers(-30, 31, (*labels.shape, 3))
            city = CITIES[split][i % len(CITIES[split])]
            for kind, suffix, picture in (
                ('leftImg8bit', 'leftImg8bit', image.astype(np.uint8)),
                ('gtFine', 'gtFine_labelTrainIds', labels),
            ):
                folder = Path(root) / kind / split / city
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f'{city}_{i:06d}_000019_{suffix}.png'
                assert cv2.imwrite(str(path), picture)
    return Path(root)


def _street(rng, width, height):
    labels = np.zeros((height, width), np.uint8)
    top = 0
    for label, share in BANDS:
        bottom = round(share * height)
        labels[top:bottom] = label
        top = bottom
    bands = {label for label, _ in BANDS}
    others = [label for label in range(CLASSES) if label not in bands]
    # Side by side, so that none hides another.
    edges = np.linspace(0, width, len(others) + 1).astype(int)
    for label, left, right in zip(
        rng.permutation(others), edges[:-1], edges[1:], strict=True
    ):
        top = rng.integers(height // 8, height // 2)
        labels[top : top + height // 3, left : max(right - 1, left + 1)] = label
    labels[-max(1, height // 16) :] = IGNORED
    return labels
