"""Reading checkpoints without running code from them, and refusing misfits.

A checkpoint of a Runner holds more than tensors: mmengine's ``HistoryBuffer`` with
numpy arrays. Torch reads such a file without running code from it only if these
types are on its list of allowed ones.
"""

import logging
import os
import os.path as osp
import pickle
import re
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import contextmanager
from http.client import HTTPException

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader

_HTTP = ('http://', 'https://')
_METHODS = ('min', 'max', 'current', 'mean')
#: Element types of numpy arrays and scalars: numbers, texts and times.
_NUMPY_TYPES = tuple({type(np.dtype(code)) for code in '?bhilqpBHILQPefdFDSUmM'})
_NUMPY_SCALARS = tuple({kind.type for kind in map(np.dtype, '?bhilqpBHILQPefdFDSUmM')})
# What torch reads by itself.
_PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray}
_PLAIN |= {torch.dtype, torch.device, torch.layout}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_DICTS = {dict, OrderedDict, Counter, ConfigDict}
_SEQUENCES = {list, tuple, set, torch.Size}
# Variables that torch.load asks, whatever its caller wants.
_FORCE, _FORCE_NOT = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


def _history_method(owner, name):
    """What a pickled ``getattr`` may do: fetch a statistic of HistoryBuffer."""
    if owner is not HistoryBuffer or name not in _METHODS:
        raise ValueError(
            f'it asks for {name!r} of {getattr(owner, "__name__", type(owner))}, which '
            'no checkpoint of a Runner does'
        )
    return getattr(HistoryBuffer, name)


def allowed_types():
    """What the checkpoint of a Runner holds beside tensors.

    Returns:
        list: For :func:`torch.serialization.add_safe_globals`.
    """
    # numpy 2 renamed the module; files of either version name what they were
    # written with.
    multiarray = getattr(np, '_core', None) or np.core
    multiarray = multiarray.multiarray
    allowed = [HistoryBuffer, ConfigDict, np.ndarray, np.dtype, *_NUMPY_TYPES]
    # Of bytes pickle names the type where there are none, as in an empty array.
    allowed += [bytes, slice]
    allowed.append((_history_method, 'builtins.getattr'))
    for home in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed.append((multiarray._reconstruct, f'{home}._reconstruct'))
        allowed.append((multiarray.scalar, f'{home}.scalar'))
    return allowed


def allow_runner_checkpoints():
    """Read checkpoints as data alone, whoever reads them, and those of a Runner too.

    From here on, and in processes that this one starts, ``torch.load`` runs no code
    from a file, not even with ``weights_only=False``, as torch.hub calls it. What
    mmengine loads goes through :func:`read_checkpoint`: it would fall back to an
    unsafe load, or allow what leads to one.

    Changes settings of the whole process, so it is called by tools and by
    :class:`CheckpointGuardHook`, not on import.
    """
    if os.environ.pop(_FORCE_NOT, None) is not None:
        print_log(
            f'{_FORCE_NOT} is ignored: checkpoints are read without running code.',
            logger='current',
            level=logging.WARNING,
        )
    os.environ[_FORCE] = '1'
    _allow()
    _take_list_of_mmengine(_nothing_more)
    for prefixes, loader in (('', load_from_local), (_HTTP, load_from_http)):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)


def _allow():
    """Put our types on torch's list, and take an unrestricted ``getattr`` off it."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(
        [t for t in allowed if t is not getattr and 'builtins.getattr' not in _names(t)]
        + allowed_types()
    )


def _names(allowed):
    return allowed[1:] if isinstance(allowed, tuple) else ()


def _nothing_more():
    return []


def _take_list_of_mmengine(function):
    """Replace what OneDL's mmengine allows by itself, where it does.

    All of ``getattr`` is on its list, through which a file reaches any function of
    any module, and torch calls it.

    Returns:
        Callable | None: What was in its place.
    """
    home = mmengine.runner.checkpoint
    before = getattr(home, 'get_torch_safe_globals', None)
    if before is not None:
        home.get_torch_safe_globals = function
    return before


@contextmanager
def _weights_only():
    """Allow what Runner checkpoints hold, and nothing that mmengine adds to it.

    ``torch.serialization.safe_globals`` would take back, on leaving, what was
    allowed before.
    """
    variables = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    allowed = torch.serialization.get_safe_globals()
    of_mmengine = _take_list_of_mmengine(_nothing_more)
    os.environ[_FORCE] = '1'
    try:
        _allow()
        with warnings.catch_warnings():
            # Of files that it then refuses, or of protocols.
            warnings.simplefilter('ignore')
            yield
    finally:
        _take_list_of_mmengine(of_mmengine)
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        del os.environ[_FORCE]
        os.environ.update({k: v for k, v in variables.items() if v is not None})


def load_from_local(filename, map_location=None):
    """Read a checkpoint from a file, for mmengine's ``CheckpointLoader``.

    Args:
        filename (str): Path.
        map_location (str, optional): Same as :func:`torch.load`.

    Returns:
        dict: The whole checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or asks for code to be run.
    """
    path = osp.expanduser(filename)
    if osp.isdir(path):
        raise IsADirectoryError(f'{filename} is a folder: name a file in it')
    if not osp.isfile(path):
        raise FileNotFoundError(f'{filename} does not exist: correct the path')
    return _read(filename, lambda: _load_checked(path, map_location))


def load_from_http(filename, map_location=None):
    """Download and read a checkpoint, for mmengine's ``CheckpointLoader``.

    Args:
        filename (str): URL.
        map_location (str, optional): Same as :func:`torch.load`.

    Returns:
        dict: The whole checkpoint.

    Raises:
        ValueError: If it is no checkpoint, or asks for code to be run.
    """
    load = mmengine.runner.checkpoint.load_from_http
    return _read(filename, lambda: load(filename, map_location))


def _load_checked(path, map_location):
    with open(path, 'rb') as file:
        start = file.read(64)
    if not start:
        raise _Unfit('damaged: the file is empty; copy or download it again')
    if start.startswith(b'PK'):
        _check_archive(path)
    elif not start.startswith(b'\x80') and _is_text(start):
        # Such as a page that asks to log in, or a pointer of Git LFS.
        raise _Unfit(
            f'it is a text that begins with {start.decode()[:24]!r}: download the '
            'checkpoint itself'
        )
    return torch.load(path, map_location=map_location, weights_only=True)


def _check_archive(path):
    """Compare what is in an archive with its checksums, as torch does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.split('/')[1:] == ['constants.pkl'] for name in names):
                raise _Unfit(
                    'it is a TorchScript archive, which is a program: save the '
                    "model's state_dict() in its place"
                )
            for member in archive.infolist():
                # torch.serialization.set_crc32_options(False) leaves them out.
                if member.CRC:
                    with archive.open(member) as file:
                        while file.read(1 << 24):
                            pass
    except (EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _Unfit(
            f'the file is damaged ({error}): copy or download it again, or take an '
            'earlier one'
        ) from error


def _is_text(start):
    try:
        return start.decode().replace('\n', ' ').isprintable()
    except UnicodeDecodeError:
        return False


class _Unfit(Exception):
    """A reason for which a file is no checkpoint."""


def _read(path, load):
    """Load with the protection, and say in one sentence why it failed."""
    try:
        with _weights_only():
            checkpoint = load()
    except (
        FileNotFoundError,
        IsADirectoryError,
        PermissionError,
        torch.cuda.OutOfMemoryError,
    ):
        raise
    except _Unfit as error:
        raise ValueError(f'{path} cannot be read as a checkpoint: {error}') from error
    except Exception as error:
        if '://' in path and isinstance(error, ImportError):
            raise ValueError(
                f'{path} cannot be read as a checkpoint: a package for such addresses '
                f'is missing ({error})'
            ) from error
        if '://' in path and isinstance(error, OSError | HTTPException):
            raise ValueError(
                f'{path} cannot be read as a checkpoint: it could not be downloaded '
                f'({error}); check the address and the network, or name a local file'
            ) from error
        raise ValueError(
            f'{path} cannot be read as a checkpoint ({_reason(error)}): it is damaged, '
            'of another format, or holds objects that only code in the file could '
            'make, which was not run; save its state dict alone'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path} holds a {type(checkpoint).__name__}, not a dict: save the '
            "model's state_dict()"
        )
    meta = checkpoint.get('meta', {})
    if not isinstance(meta, dict | torch.Tensor):
        raise ValueError(
            f'{path} holds a {type(meta).__name__} under meta, not a dict: it is of '
            "another format; save the model's state_dict()"
        )
    return checkpoint


def _reason(error):
    """The one line of an error that says something of the file."""
    text = str(error)
    wanted = re.search(r'GLOBAL (\S+)', text)
    if wanted:
        return f'it asks for {wanted[1]}, which is not data'
    lines = text.strip().splitlines() or ['no reason given']
    if isinstance(error, pickle.UnpicklingError) and 'https://' in text:
        # Torch wraps what it found in advice on how to run the code.
        lines = [line for line in lines if 'WeightsUnpickler error' in line] or lines
        lines[0] = lines[0].split('WeightsUnpickler error: ')[-1]
    return f'{type(error).__name__}: {lines[0][:200]}'


def read_checkpoint(path):
    """Read a checkpoint from a file or URL, running no code from it.

    Args:
        path (str): Anything that mmengine's ``CheckpointLoader`` takes.

    Returns:
        dict: The whole checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or asks for code to be run.
    """
    if '://' not in path:
        return load_from_local(path, 'cpu')
    if path.startswith(_HTTP):
        return load_from_http(path, 'cpu')
    return _read(path, lambda: CheckpointLoader.load_checkpoint(path, 'cpu'))


def unreadable_entries(content):
    """What :func:`read_checkpoint` would refuse in a checkpoint to be saved.

    Looks at types alone, so it costs little whatever the size of the tensors.

    Args:
        content (dict): To be given to :func:`torch.save`.

    Returns:
        list[str]: Such as ``'meta.time (datetime)'``.
    """
    found, seen = [], set()

    def look(value, name):
        kind = type(value)
        if kind in _PLAIN or kind in _TENSORS or kind in _NUMPY_TYPES:
            return
        if kind in (np.ndarray, *_NUMPY_SCALARS):
            if type(value.dtype) not in _NUMPY_TYPES:
                found.append(f'{name} (array of {value.dtype})')
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if kind in _DICTS:
            for key, entry in value.items():
                if type(key) is not str:
                    look(key, f'{name} as a key')
                look(entry, f'{name}.{key}' if name else str(key))
            if kind is OrderedDict:
                look(vars(value), name)
        elif kind in _SEQUENCES:
            for number, entry in enumerate(value):
                look(entry, f'{name}[{number}]')
        elif kind is slice:
            look((value.start, value.stop, value.step), name)
        elif kind is HistoryBuffer:
            for key, entry in vars(value).items():
                if key != 'statistics_methods':
                    look(entry, f'{name}.{key}')
            for key in vars(HistoryBuffer)['_statistics_methods']:
                if key not in _METHODS:
                    found.append(f'{name} (statistics {key!r} of its own)')
        else:
            found.append(f'{name} ({kind.__name__})')

    look(content, '')
    return found
