"""Unpack CamVid's street scenes, as the configs in configs/camvid read them.

SRC is camvid.tar, with images/{train,val,test}/*.jpg of 480x360 pixels and
annotations/{train,val,test}/*.png, whose pixels are 0 to 10 for the classes and 11
for what is not labelled.

DST gets the same layout: the images unchanged, and label maps in which 255 stands
for what is not labelled, the value that mmseg ignores. Their palette shows the
classes in CamVid's colours. DST appears when all is complete: an interrupted run
leaves DST.partial, and can simply be started again.
"""

import io
import os
import os.path as osp
import re
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

# For those who import this file from elsewhere.
sys.path.append(osp.dirname(osp.abspath(__file__)))

import archives
from archives import ConversionError

# In the order of the labels, with the colours that they are usually drawn in.
CLASSES = {
    'Sky': (128, 128, 128),
    'Building': (128, 0, 0),
    'Pole': (192, 192, 128),
    'Road': (128, 64, 128),
    'Pavement': (0, 0, 192),
    'Tree': (128, 128, 0),
    'SignSymbol': (192, 128, 128),
    'Fence': (64, 64, 128),
    'Car': (64, 0, 128),
    'Pedestrian': (64, 64, 0),
    'Bicyclist': (0, 128, 192),
}
# Images of each split.
COUNTS = {'train': 367, 'val': 101, 'test': 233}
# What is not labelled, in the archive and as mmseg wants it.
UNLABELLED, IGNORE = 11, 255

SUFFIXES = {'images': '.jpg', 'annotations': '.png'}
MEMBER = re.compile(
    r'(?P<kind>images)/(?P<split>train|val|test)/(?P<stem>\w+)\.jpg'
    r'|(?P<kind2>annotations)/(?P<split2>train|val|test)/(?P<stem2>\w+)\.png'
)


def open_image(name: str, data: bytes, kind: str) -> Image.Image:
    """Decode an image or label map whole, or say that it cannot be."""
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        image.load()
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ConversionError(
            f'{name} in the archive is not a readable {kind} file ({error}): get the '
            'archive again.'
        ) from error
    return image


def convert_labels(name: str, image: Image.Image) -> bytes:
    """A label map as PNG, with 255 for what is not labelled."""
    if image.mode not in ('L', 'P'):
        raise ConversionError(
            f'{name} in the archive is of mode {image.mode}, not one label index a '
            'pixel: get the archive again.'
        )
    labels = np.array(image)
    if labels.max() > UNLABELLED:
        raise ConversionError(
            f'{name} in the archive holds the label {labels.max()}, and the last one '
            f'is {UNLABELLED}: give camvid.tar with its 11 classes.'
        )
    labels[labels == UNLABELLED] = IGNORE
    # With fewer than 256 colours, the file would get fewer bits a pixel.
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(CLASSES)] = list(CLASSES.values())
    converted = Image.fromarray(labels)
    converted.putpalette(palette.tobytes())
    file = io.BytesIO()
    converted.save(file, 'PNG', optimize=True)
    return file.getvalue()


def read_archive(src: str) -> Iterator[tuple[str, tuple[int, int], bytes]]:
    """Yield (file name, width and height, bytes) of all images and label maps."""
    foreign = (
        'CamVid does not: give camvid.tar, with images/{train,val,test}/*.jpg and '
        'annotations/{train,val,test}/*.png.'
    )
    for member, data in archives.read_members(src, MEMBER, foreign):
        name = osp.normpath(member[0])
        if member['kind']:
            yield name, open_image(name, data, 'JPEG').size, data
        else:
            image = open_image(name, data, 'PNG')
            yield name, image.size, convert_labels(name, image)


def stems(folder: str, kind: str, split: str) -> set[str]:
    """Names without suffix of the images, or label maps, of a split."""
    path, suffix = osp.join(folder, kind, split), SUFFIXES[kind]
    names = os.listdir(path) if osp.isdir(path) else []
    return {n.removesuffix(suffix) for n in names if n.endswith(suffix)}


def faults(folder: str) -> list[str]:
    """Say what a folder has too much or too little of."""
    found = []
    for split, wanted in COUNTS.items():
        images, labels = (stems(folder, kind, split) for kind in SUFFIXES)
        for stem in sorted(images - labels):
            found.append(f'images/{split}/{stem}.jpg has no label map')
        for stem in sorted(labels - images):
            found.append(f'annotations/{split}/{stem}.png has no image')
        if len(images) != wanted:
            found.append(f'{split} has {len(images)} images instead of {wanted}')
    return found


def convert(src: str, dst: str, force: bool = False) -> bool:
    """Convert the archive; see :func:`archives.convert`."""

    def write(folder):
        for kind in SUFFIXES:
            for split in COUNTS:
                os.makedirs(osp.join(folder, kind, split))
        sizes = {}
        total = len(SUFFIXES) * sum(COUNTS.values())
        title = osp.basename(osp.abspath(dst))
        for name, size, data in track(read_archive(src), title, total):
            # Images and their label maps come in any order.
            pair = osp.splitext(name)[0].split('/', 1)[1]
            other = sizes.setdefault(pair, size)
            if size != other:
                raise ConversionError(
                    f'{name} in the archive has {size[0]}x{size[1]} pixels, and its '
                    f'counterpart {other[0]}x{other[1]}: get the archive again.'
                )
            with open(osp.join(folder, name), 'xb') as file:
                file.write(data)

    return archives.convert(src, dst, force, write, faults)


def print_shares(dst: str) -> None:
    """Print which share of the pixels each class has, split by split."""
    table = Table('class', title='Share of the pixels, %')
    shares = []
    for split in COUNTS:
        table.add_column(split, justify='right')
        pixels = np.zeros(256, np.int64)
        for stem in stems(dst, 'annotations', split):
            with Image.open(osp.join(dst, 'annotations', split, f'{stem}.png')) as file:
                pixels += np.bincount(np.asarray(file).ravel(), minlength=256)
        shares.append(100 * pixels / pixels.sum())
    rows = [*enumerate(CLASSES), (IGNORE, '(not labelled)')]
    for label, name in rows:
        table.add_row(name, *(f'{share[label]:.2f}' for share in shares))
    Console().print(table)


def main() -> None:
    contents = '367 training, 101 validation and 233 test images, each with labels'
    print_shares(archives.run(__doc__, 'data/camvid', convert, contents))


if __name__ == '__main__':
    main()
