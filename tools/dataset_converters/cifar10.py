"""Unpack CIFAR-10 to one folder a class, as the configs in configs/cifar10 read it.

SRC is one of
  - cifar10_jpeg.tar.xz, all images as JPEG files in {train,test}/<class>/;
  - cifar-10-python.tar.gz, the official archive, whose images are written
    unchanged as PNG files.

DST becomes {train,test}/<class>/<class>_<number>.{jpg,png}, with 5,000 training and
1,000 test images a class. It appears when all is complete: an interrupted run leaves
DST.partial, and can simply be started again.
"""

import argparse
import codecs
import io
import lzma
import os
import os.path as osp
import pickle
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import cv2
import numpy as np
from rich.progress import track

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

JPEG = re.compile(rf'(train|test)/({"|".join(CLASSES)})/(\w+)\.jpe?g')
BATCH = re.compile(r'cifar-10-batches-py/(data_batch_[1-5]|test_batch)')
# What the official archive holds beside its batches.
IGNORED = re.compile(r'cifar-10-batches-py/(batches\.meta|readme\.html)')


class ConversionError(Exception):
    """Says why the archive cannot be converted, and what to do."""


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
    """Yield (split, file name, bytes) of all images of either archive.

    Nothing is extracted to the names that the archive gives, so that no member can
    be written outside of the destination.
    """
    with tarfile.open(src) as archive:
        for member in archive:
            name = osp.normpath(member.name)
            if member.isdir() or IGNORED.fullmatch(name):
                continue
            jpeg, batch = JPEG.fullmatch(name), BATCH.fullmatch(name)
            if not member.isreg() or not (jpeg or batch):
                raise ConversionError(
                    f'{src} holds {member.name!r}, which neither CIFAR-10 archive '
                    'does: give cifar10_jpeg.tar.xz or cifar-10-python.tar.gz.'
                )
            data = archive.extractfile(member).read()
            if jpeg:
                yield from read_jpegs(*jpeg.groups(), data)
            else:
                yield from read_batch(batch[1], data)


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
    """Convert an archive.

    Args:
        src (str): The archive.
        dst (str): The folder to be made.
        force (bool): Replace ``dst`` where it exists. Defaults to False.

    Returns:
        bool: False where ``dst`` was complete and nothing was done.

    Raises:
        ConversionError: If the archive is not CIFAR-10, or ``dst`` is in the way.
            ``dst`` is then as it was.
    """
    if osp.lexists(dst) and not force:
        if not osp.isdir(dst):
            raise ConversionError(f'{dst} is in the way: it is not a folder.')
        if os.listdir(dst):
            wrong = wrong_counts(dst)
            if not wrong:
                return False
            raise ConversionError(
                f'{dst} exists and is not complete ({wrong[0]}): name another folder, '
                'or replace it with --force.'
            )
    if not osp.isfile(src):
        raise ConversionError(f'the archive {src} does not exist.')

    dst = osp.abspath(dst)
    partial = f'{dst}.partial'
    shutil.rmtree(partial, ignore_errors=True)
    for split in COUNTS:
        for name in CLASSES:
            os.makedirs(osp.join(partial, split, name))
    total = len(CLASSES) * sum(COUNTS.values())
    try:
        for split, name, data in track(read_archive(src), osp.basename(dst), total):
            with open(osp.join(partial, split, name), 'xb') as file:
                file.write(data)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ConversionError(
            f'{src} could not be unpacked ({error}): get the archive again, or make '
            'room on the disk.'
        ) from error
    wrong = wrong_counts(partial)
    if wrong:
        raise ConversionError(
            f'{src} is not complete: {wrong[0]} ({len(wrong)} such classes).'
        )
    replace(partial, dst)
    return True


def replace(new: str, dst: str) -> None:
    """Put a folder in the place of another, which is removed only after that."""
    aside = tempfile.mkdtemp(prefix=f'{osp.basename(dst)}.old-', dir=osp.dirname(dst))
    old = osp.join(aside, osp.basename(dst))
    if osp.lexists(dst):
        os.rename(dst, old)
    try:
        os.rename(new, dst)
    except OSError:
        if osp.lexists(old):
            os.rename(old, dst)
        raise
    shutil.rmtree(aside)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('src', metavar='SRC', help='the archive')
    parser.add_argument(
        'dst', metavar='DST', nargs='?', default='data/cifar10', help='%(default)s'
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    try:
        converted = convert(args.src, args.dst, args.force)
    except (ConversionError, OSError) as error:
        sys.exit(f'{parser.prog}: error: {error}')
    state = 'is complete' if converted else 'was complete already, nothing was done'
    print(f'{args.dst} {state}: 50,000 training and 10,000 test images.')


if __name__ == '__main__':
    main()
