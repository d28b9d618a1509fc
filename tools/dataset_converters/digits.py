"""Write scikit-learn's handwritten digits to an ImageNet-layout folder.

1,797 real images of 8x8 pixels in 16 grey levels (Alpaydin and Kaynak 1998), which
ship with scikit-learn. A third of each class is for test; the split is fixed.

Example:
    python tools/dataset_converters/digits.py data/digits
"""

import argparse
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track


def split_digits():
    """The digits, and which of them are for what.

    Returns:
        tuple[Bunch, dict[str, np.ndarray]]: What scikit-learn loads, and the
        numbers of the digits of ``'train'`` and ``'test'``.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = np.arange(len(digits.images))
    train, test = train_test_split(
        numbers, test_size=1 / 3, random_state=0, stratify=digits.target
    )
    return digits, dict(train=train, test=test)


@contextmanager
def whole_folder(root):
    """A folder to write to, beside its place, which is renamed when all is written.

    Args:
        root (Path): Where the folder is to be.

    Yields:
        Path: Where to write.
    """
    partial = root.with_name(f'{root.name}.partial-{os.getpid()}')
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_digits(root):
    """Write ``root/{train,test}/<digit>/<number>.png``, once.

    The folder is written beside its place and renamed when it is whole.

    Args:
        root (str | Path): Folder of the data set.

    Returns:
        bool: Whether it was written; False where it was there already.

    Raises:
        FileExistsError: If the folder exists and holds something else.
    """
    root = Path(root)
    digits, parts = split_digits()
    if root.exists():
        found = len(list(root.glob('*/*/*.png')))
        if found == len(digits.images):
            return False
        raise FileExistsError(
            f'{root} exists with {found} images of {len(digits.images)}: move it away, '
            'or name another folder'
        )
    split = {number: name for name, part in parts.items() for number in part}
    with whole_folder(root) as partial:
        for number in track(sorted(split), description='Writing digits'):
            folder = partial / split[number] / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            grey = (digits.images[number] * 255 / 16).round().astype(np.uint8)
            Image.fromarray(grey).save(folder / f'{number:04d}.png')
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('root', nargs='?', default='data/digits', help='where to write')
    args = parser.parse_args(argv)
    try:
        written = write_digits(args.root)
    except (FileExistsError, ImportError) as error:
        sys.exit(str(error))
    print(f'{args.root}: {"1797 images written" if written else "already there"}')


if __name__ == '__main__':
    main()
