"""Compose scenes of scikit-learn's handwritten digits, with a label for each pixel.

Real digits, enlarged, on textured ground of varying brightness; each digit is
lighter or darker than the ground around it. A pixel's label is 0 on the ground and
digit + 1 on its strokes. Scenes for test show only digits that digits.py keeps for
test. Written are ROOT/{images,annotations}/{train,test}/<number>.png, grey and of
64x64 pixels; every run writes the same.

Example:
    python tools/dataset_converters/digit_scenes.py data/digit_scenes
"""

import argparse
import os.path as osp
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

# For those who import this file from elsewhere.
sys.path.append(osp.dirname(osp.abspath(__file__)))

from digits import split_digits, whole_folder

# Scenes of each split, and a side of a scene in pixels.
COUNTS = dict(train=1600, test=200)
SIDE = 64
# Digits in a scene: one in each of its quarters at most. They meet somewhere between
# two bounds, and leave a gap on each side.
DIGITS = (3, 4)
CUT = (28, 36)
GAP = 1
# Side to which the 8x8 pixels of a digit are enlarged at least; a quarter is filled
# at most.
SMALLEST = 25
# How much lighter or darker than its surroundings a digit is.
CONTRAST = (0.35, 0.55)
# Standard deviation of the noise on each pixel; full brightness is 1.
NOISE = 0.02
# Levels of a digit, of 1, between which the ink sets in. A pixel belongs to a stroke
# where at least half of it is ink.
EDGE = (0.1, 0.5)


def write_scenes(root, counts=COUNTS):
    """Write ``root/{images,annotations}/{train,test}/<number>.png``, once.

    The folder is written beside its place and renamed when it is whole.

    Args:
        root (str | Path): Folder of the data set.
        counts (dict[str, int]): Scenes of ``'train'`` and ``'test'``.

    Returns:
        bool: Whether it was written; False where it was there already.

    Raises:
        FileExistsError: If the folder exists and holds something else.
    """
    root = Path(root)
    wanted = {
        f'{kind}/{split}/{number:04d}.png'
        for kind in ('images', 'annotations')
        for split, count in counts.items()
        for number in range(count)
    }
    if root.exists():
        found = {p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file()}
        if found == wanted:
            return False
        raise FileExistsError(
            f'{root} exists with {len(found & wanted)} of {len(wanted)} files and '
            f'{len(found - wanted)} others: move it away, or name another folder'
        )
    digits, parts = split_digits()
    scenes = [(split, n) for split, count in counts.items() for n in range(count)]
    with whole_folder(root) as partial:
        for kind in ('images', 'annotations'):
            for split in counts:
                (partial / kind / split).mkdir(parents=True)
        for split, number in track(scenes, description='Writing scenes'):
            image, labels, _ = compose(digits, parts[split], generator(split, number))
            name = f'{split}/{number:04d}.png'
            Image.fromarray(image).save(partial / 'images' / name)
            Image.fromarray(labels).save(partial / 'annotations' / name)
    return True


def generator(split, number):
    """Random numbers that depend on nothing but the name of a scene."""
    return np.random.default_rng([number, ('test', 'train').index(split)])


def compose(digits, numbers, rng):
    """Make a scene.

    Args:
        digits (Bunch): What scikit-learn loads.
        numbers (np.ndarray): Digits that may appear.
        rng (np.random.Generator): Source of all that is random.

    Returns:
        tuple[np.ndarray, np.ndarray, list[int]]: Image and labels, uint8, (SIDE,
        SIDE), and the numbers of the digits that are in it.
    """
    scene = ground(rng)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    fields = quarters(rng)
    shown = rng.choice(numbers, rng.integers(*DIGITS, endpoint=True), replace=False)
    for number, i in zip(shown, rng.permutation(len(fields)), strict=False):
        rows, columns = fields[i]
        largest = min(rows.stop - rows.start, columns.stop - columns.start)
        side = rng.integers(SMALLEST, largest, endpoint=True)
        ink = enlarged(digits.images[number] / 16, side)
        area = placed(rows, ink.shape[0], rng), placed(columns, ink.shape[1], rng)
        under = scene[area]
        mean = under.mean()
        contrast = rng.uniform(*CONTRAST) * rng.choice([-1, 1])
        if not 0 <= mean + contrast <= 1:
            contrast = -contrast
        scene[area] = under + ink * (mean + contrast - under)
        labels[area][ink >= 0.5] = digits.target[number] + 1
    scene += rng.normal(0, NOISE, scene.shape)
    image = (scene.clip(0, 1) * 255).round().astype(np.uint8)
    return image, labels, shown.tolist()


def quarters(rng):
    """Four fields about a point near the middle, with a gap between them.

    Returns:
        list[tuple[slice, slice]]: Rows and columns of each.
    """
    cuts = rng.integers(*CUT, size=2, endpoint=True)
    halves = [(slice(0, c - GAP), slice(c + GAP, SIDE)) for c in cuts]
    return [(rows, columns) for rows in halves[0] for columns in halves[1]]


def placed(span, length, rng):
    """A slice of some length anywhere within another."""
    start = int(rng.integers(span.start, span.stop - length, endpoint=True))
    return slice(start, start + length)


def ground(rng):
    """Coarse and fine waves around a random brightness, (SIDE, SIDE)."""
    scene = np.full((SIDE, SIDE), rng.uniform(0.3, 0.7))
    for cells, strength in ((3, 0.25), (8, 0.1), (24, 0.05)):
        noise = rng.uniform(-strength, strength, (cells, cells))
        scene += resized(noise, (SIDE, SIDE))
    return scene


def enlarged(digit, side):
    """The digit of 8x8 pixels at another size, with crisp edges, cropped to its ink.

    Returns:
        np.ndarray: How much of the ground is covered, in [0, 1].
    """
    grey = resized(digit, (side, side))
    ink = ((grey - EDGE[0]) / (EDGE[1] - EDGE[0])).clip(0, 1)
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def resized(values, shape):
    height, width = shape
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument(
        'root', nargs='?', default='data/digit_scenes', help='where to write'
    )
    args = parser.parse_args(argv)
    try:
        written = write_scenes(args.root)
    except (FileExistsError, ImportError) as error:
        sys.exit(str(error))
    total = ' and '.join(f'{n} scenes for {split}' for split, n in COUNTS.items())
    print(f'{args.root}: {total} {"written" if written else "already there"}')


if __name__ == '__main__':
    main()
