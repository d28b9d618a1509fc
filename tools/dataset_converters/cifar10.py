"""Unpack CIFAR-10 to one folder a class, as the configs in configs/cifar10 read it.

SRC is one of
  - cifar10_jpeg.tar.xz, all images as JPEG files in {train,test}/<class>/;
  - cifar-10-python.tar.gz, the official archive, whose images are written
    unchanged as PNG files.

DST becomes {train,test}/<class>/<class>_<number>.{jpg,png}, with 5,000 training and
1,000 test images a class. It appears when all is complete: an interrupted run leaves
DST.partial, and can simply be started again.
"""

import codecs
import io
import os
import os.path as osp
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import cv2
import numpy as np
from rich.progress import track

# For those who import this file from elsewhere.
sys.path.append(osp.dirname(osp.abspath(__file__)))

import archives
from archives import ConversionError

CLASSES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
)
# Images of each class.
COUNTS = {'train': 5000, 'test': 1000}

# A file of the one archive, and of the other.
MEMBER = re.compile(
    rf'(?P<split>train|test)/(?P<name>{"|".join(CLASSES)})/(?P<stem>\w+)\.jpe?g'
    r'|cifar-10-batches-py/(?P<batch>data_batch_[1-5]|test_batch)'
)
# What the official archive holds beside its batches.
IGNORED = re.compile(r'cifar-10-batches-py/(batches\.meta|readme\.html)')


class BatchUnpickler(pickle.Unpickler):
    """Reads the official batches, and refuses all that could run code."""

    # numpy 2 renamed the module that the official files name.
    reconstruct = (getattr(np, '_core', None) or np.core).multiarray._reconstruct
    allowed: ClassVar = {
        ('numpy', 'ndarray'): np.ndarray,
        ('numpy', 'dtype'): np.dtype,
        ('numpy.core.multiarray', '_reconstruct'): reconstruct,
        ('numpy._core.multiarray', '_reconstruct'): reconstruct,
        ('_codecs', 'encode'): codecs.encode,
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f'{module}.{name} is not allowed')
        return self.allowed[module, name]


def read_jpegs(split, name, stem, data) -> Iterator[tuple[str, str, bytes]]:
    """Check one JPEG file; yield its split, class and file name, and bytes."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None or image.shape != (32, 32, 3):
        raise ConversionError(
            f'{split}/{name}/{stem}.jpg in the archive is not a 32x32 image: get the '
            'archive again.'
        )
    yield split, osp.join(name, f'{name}_{stem}.jpg'), data


def read_batch(batch, data) -> Iterator[tuple[str, str, bytes]]:
    """Yield the images of an official batch as PNG files."""
    try:
        content = BatchUnpickler(io.BytesIO(data), encoding='bytes').load()
        images, labels = content[b'data'], content[b'labels']
        images = images.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        names = [CLASSES[label] for label in labels]
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ConversionError(
            f'{batch} in the archive is not a CIFAR-10 batch ({error}): get the '
            'archive again.'
        ) from error
    # Files are numbered by their place in the official data set.
    split, start = 'test', 0
    if batch != 'test_batch':
        split, start = 'train', 10000 * (int(batch[-1]) - 1)
    for i, (image, name) in enumerate(zip(images, names, strict=True), start):
        png = cv2.imencode('.png', image[..., ::-1])[1].tobytes()
        yield split, osp.join(name, f'{name}_{i:05d}.png'), png


def read_archive(src: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield (split, file name, bytes) of all images of either archive."""
    foreign = (
        'neither CIFAR-10 archive does: give cifar10_jpeg.tar.xz or '
        'cifar-10-python.tar.gz.'
    )
    for member, data in archives.read_members(src, MEMBER, foreign, IGNORED):
        if member['batch']:
            yield from read_batch(member['batch'], data)
        else:
            yield from read_jpegs(member['split'], member['name'], member['stem'], data)


def count(folder: str) -> Counter:
    """Number of images of each (split, class) in a folder."""
    found = Counter()
    for split in COUNTS:
        for name in CLASSES:
            path = osp.join(folder, split, name)
            if osp.isdir(path):
                files = os.listdir(path)
                found[split, name] = sum(f.endswith(('.jpg', '.png')) for f in files)
    return found


def wrong_counts(folder: str) -> list[str]:
    """Say of which classes a folder has another number of images than CIFAR-10."""
    found = count(folder)
    return [
        f'{split}/{name} has {found[split, name]} images instead of {wanted}'
        for split, wanted in COUNTS.items()
        for name in CLASSES
        if found[split, name] != wanted
    ]


def convert(src: str, dst: str, force: bool = False) -> bool:
    """Convert an archive; see :func:`archives.convert`."""

    def write(folder):
        for split in COUNTS:
            for name in CLASSES:
                os.makedirs(osp.join(folder, split, name))
        total = len(CLASSES) * sum(COUNTS.values())
        title = osp.basename(osp.abspath(dst))
        for split, name, data in track(read_archive(src), title, total):
            with open(osp.join(folder, split, name), 'xb') as file:
                file.write(data)

    return archives.convert(src, dst, force, write, wrong_counts)


def main() -> None:
    contents = '50,000 training and 10,000 test images'
    archives.run(__doc__, 'data/cifar10', convert, contents)


if __name__ == '__main__':
    main()
