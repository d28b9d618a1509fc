r"""Put a trained model among those that come with the package.

Of a checkpoint of a training the weights and the names of the classes are kept. The
file goes to the folder checkpoints/ beside the config, with the first digits of its
SHA-256 in its name, and into the metafile as Weights. It then loads by name:

    mdeq_mm.get_model('mdeq-digits', pretrained=True)

Afterwards run dev/model_zoo.py --write, which puts it into docs/model_zoo.md.
With --out the file goes anywhere, and nothing else is written: to publish a model of
one's own.

Example:
    python tools/misc/publish_model.py mdeq-digits \
        work_dirs/mdeq_1xb64-30e_digits/epoch_30.pth
"""

import argparse
import hashlib
import io
import numbers
import os.path as osp
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(1, osp.dirname(osp.abspath(__file__)))
from common import fail
from metafiles import set_field

from mdeq_mm import __version__, get_config
from mdeq_mm.apis.index import SCHEME, find_entry, zoo_root
from mdeq_mm.apis.inference import load_model
from mdeq_mm.apis.loading import dataset_meta
from mdeq_mm.checkpoints import check_finite, read_checkpoint, state_dict_of
from mdeq_mm.checkpoints.saving import AtomicLocalBackend

#: Bytes that a file in the repository may have.
LIMIT = 1_000_000


def plain(value):
    """Lists, dicts, numbers and texts in place of whatever holds them."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, 'tolist'):
        # An array, or one of its numbers.
        return value.tolist()
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, str | numbers.Number):
        return value
    return str(value)


def halved(state):
    """The same weights in half precision; integers stay.

    Statistics of norms stay too: variances may be too small for it.

    Raises:
        ValueError: If a number is too large for half precision.
    """
    half = {
        key: value.half()
        if value.is_floating_point() and '.running_' not in key
        else value
        for key, value in state.items()
    }
    check_finite(half)
    return half


def content_of(entry, checkpoint, half):
    """What is published of a checkpoint.

    Args:
        entry (Entry): The model.
        checkpoint (dict): The whole of it.
        half (bool): Whether weights are kept in half precision.

    Returns:
        dict: ``state_dict``, and ``meta`` with plain types.
    """
    state = {k: v.detach().cpu().clone() for k, v in state_dict_of(checkpoint).items()}
    check_finite(state)
    meta = checkpoint.get('meta')
    found = meta.get('dataset_meta') if isinstance(meta, Mapping) else None
    return dict(
        state_dict=halved(state) if half else state,
        meta=dict(
            # A state dict alone says nothing of its classes.
            dataset_meta=plain(
                dataset_meta(get_config(entry.config)) | dict(found or {})
            ),
            model=entry.name,
            mdeq_mm_version=__version__,
        ),
    )


def data_of(entry, source, half):
    """The content of a published file, as bytes.

    Args:
        entry (Entry): The model.
        source (str): The checkpoint.
        half (bool): Whether weights are kept in half precision.
    """
    buffer = io.BytesIO()
    # To memory: in a file its own name would be part of the content.
    torch.save(content_of(entry, read_checkpoint(str(source)), half), buffer)
    return buffer.getvalue()


def write(data, name, target):
    """Write a file with the first digits of its hash in its name, and load it.

    Args:
        data (bytes): Content.
        name (str): Of the model.
        target (Path): Path without the hash.

    Returns:
        Path: The file.

    Raises:
        RuntimeError: If it is of another architecture; nothing is left then.
        ValueError: If it cannot be used.
    """
    digest = hashlib.sha256(data).hexdigest()[:8]
    path = target.with_name(f'{target.stem}-{digest}.pth')
    new = not path.exists()
    AtomicLocalBackend().put(data, path)
    try:
        # As a user will load it.
        load_model(get_config(name), path, 'cpu')
    except (RuntimeError, ValueError):
        if new:
            path.unlink()
        raise
    return path


def publish(name, source, half=False, root=None, limit=LIMIT):
    """Write the weights of a model, and name them in its metafile.

    Args:
        name (str): Of the model.
        source (str): The checkpoint.
        half (bool): Whether weights are kept in half precision.
        root (Path, optional): Folder of the index. Default: the package's.
        limit (int): Bytes that the file may have.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        RuntimeError: If it is of another architecture.
        ValueError: If there is no such model, or the checkpoint cannot be used.
    """
    root = Path(root or zoo_root())
    entry = find_entry(name)
    data = data_of(entry, source, half)
    if len(data) > limit:
        remedy = '' if half else '; --half halves it'
        raise ValueError(
            f'the weights take {len(data):,} bytes, more than the {limit:,} that a '
            f'file in the repository may have{remedy}'
        )
    config = root / entry.config
    path = write(data, name, config.parent / 'checkpoints' / f'{config.stem}.pth')
    metafile = config.parent / 'metafile.yml'
    text = metafile.read_text(encoding='utf-8')
    address = f'{SCHEME}{path.relative_to(root).as_posix()}'
    text = set_field(text, entry.name, 'Weights', address)
    metafile.write_text(text, encoding='utf-8')
    return path


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('name', help='name of the model')
    parser.add_argument('checkpoint', help='of its training')
    parser.add_argument(
        '--half', action='store_true', help='keep weights in half precision'
    )
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='write there, FILE-<hash>.pth, of any size, and leave the package as it '
        'is; NAME may be a config file then',
    )
    parser.add_argument(
        '--replace',
        action='store_true',
        help='take the place of weights that are published already',
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        if args.out:
            data = data_of(find_entry(args.name), args.checkpoint, args.half)
            path = write(data, args.name, Path(args.out))
            print(f'{path} ({path.stat().st_size:,} bytes)')
            return
        weights = find_entry(args.name).weights
        if weights and not args.replace:
            fail(f'{args.name!r} has weights, {weights}: --replace takes their place.')
        path = publish(args.name, args.checkpoint, args.half)
    except (OSError, RuntimeError, ValueError) as error:
        fail(f'{error}.')
    print(f'{path} ({path.stat().st_size:,} bytes) is published.')
    print('Results in its metafile are not looked at: write down what it reaches.')
    meta = read_checkpoint(str(path))['meta']['dataset_meta']
    if not meta.get('classes'):
        print('It names no classes, so predictions will have numbers alone.')
    stem = path.stem.rpartition('-')[0]
    for other in sorted(path.parent.glob(f'{stem}-????????.pth')):
        if other != path:
            print(f'{other} was published before and can be removed.')


if __name__ == '__main__':
    main()
