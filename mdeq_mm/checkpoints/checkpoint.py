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
from mmengine.model import PretrainedInit
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


def state_dict_of(checkpoint):
    """The state dict within a checkpoint, whatever wraps it.

    Args:
        checkpoint (dict): A state dict, or a dict with one under ``state_dict``
            or ``model``.

    Returns:
        dict[str, Tensor]: Without the ``module.`` that parallel wrappers put in
        front of all names.

    Raises:
        ValueError: If it is no dict, or its keys are no names.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'the checkpoint is a {type(checkpoint).__name__}, not a dict: save the '
            "model's state_dict()"
        )
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    for key in checkpoint:
        if not isinstance(key, str):
            raise ValueError(
                f'the checkpoint has an entry {key!r}, which is no name of a weight: '
                "save the model's state_dict()"
            )
    if checkpoint and all(k.startswith('module.') for k in checkpoint):
        return {k.removeprefix('module.'): v for k, v in checkpoint.items()}
    return dict(checkpoint)


def check_state_dict(module, state_dict, prefix, *args):
    """Pre-hook for ``load_state_dict``: all that a module has must be there and fit.

    mmengine loads checkpoints leniently and logs what does not fit; a backbone
    that was loaded in part trains on unnoticed, so this refuses it.

    Args:
        module (nn.Module): The module that loads.
        state_dict (dict): What it loads from.
        prefix (str): Of the module's names in ``state_dict``.
        *args: What else PyTorch hands to such hooks.

    Raises:
        RuntimeError: If entries are missing or of other shapes.
        ValueError: If entries are no tensors of numbers in floating point, or not
            finite in the precision of the module.
    """
    name = type(module).__name__
    own = module.state_dict()
    optional = tuple(k for k in own if k.endswith('num_batches_tracked'))
    missing = [k for k in own if prefix + k not in state_dict and k not in optional]
    if missing:
        raise RuntimeError(
            f'the checkpoint lacks {len(missing)} of the {len(own)} entries of {name}, '
            f'the first being {prefix + missing[0]!r}: it is of another architecture, '
            'or its names carry another prefix; official checkpoints are converted '
            'with tools/model_converters/mdeq2mm.py'
        )
    for key, value in own.items():
        found = state_dict.get(prefix + key)
        if found is not None:
            _check_fits(prefix + key, found, value, name)


def _check_fits(key, found, value, name):
    """Refuse an entry that a weight could not be copied from as it is."""
    if not isinstance(found, torch.Tensor):
        raise ValueError(
            f'{key} is a {type(found).__name__} in the checkpoint, not a tensor: save '
            "the model's state_dict()"
        )
    if found.shape != value.shape:
        raise RuntimeError(
            f'{key} has shape {tuple(found.shape)} in the checkpoint and '
            f'{tuple(value.shape)} in {name}: set its channels to those of the '
            'checkpoint (arch for a backbone), or take the backbone alone, with '
            "init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')"
        )
    if not _is_dense(found) or value.is_floating_point() > found.is_floating_point():
        raise ValueError(
            f'{key} is a {str(found.dtype).removeprefix("torch.")} tensor of layout '
            f'{str(found.layout).removeprefix("torch.")} on {found.device} in the '
            f'checkpoint, from which {value.dtype} cannot be loaded: save dense '
            'weights in floating point'
        )
    # In the precision of the module, where large numbers may be infinite.
    check_finite({key: found.to(value.dtype)})


def _is_dense(tensor):
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    )


def check_finite(state_dict):
    """Refuse a state dict with numbers that are not finite.

    Args:
        state_dict (dict): Names to tensors; other entries are passed over.

    Raises:
        ValueError: Naming the first such entry.
    """
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or not _is_dense(value):
            continue
        if value.is_floating_point() and value.element_size() == 1:
            # For numbers of eight bits torch has no test.
            value = value.float()
        if not value.isfinite().all():
            raise ValueError(
                f'{key} holds non-finite numbers in the checkpoint: take an earlier one'
            )


def check_resumable(checkpoint):
    """Refuse a checkpoint that holds weights, but no training to go on with.

    Args:
        checkpoint (dict): The whole of it.

    Raises:
        ValueError: Naming what is not there.
    """
    wanted = dict(
        meta=dict(epoch=int, iter=int),
        message_hub=dict(log_scalars=dict, runtime_info=dict, resumed_keys=dict),
    )
    for part, entries in wanted.items():
        content = checkpoint.get(part)
        for key, kind in entries.items():
            if not isinstance(content, dict) or not isinstance(content.get(key), kind):
                raise ValueError(
                    f'it lacks {part}.{key}, so there is no training in it to resume: '
                    'start from its weights with --cfg-options load_from=PATH and '
                    'without --resume'
                )


def check_no_more(module, state_dict, prefix, *args):
    """Pre-hook for ``load_state_dict``: refuses weights of a larger architecture.

    All that a module has may be there and fit, and yet be part of a model with
    more branches or blocks, whose weights mean something else without the rest.

    Args:
        module (nn.Module): The module that loads.
        state_dict (dict): What it loads from.
        prefix (str): Of the module's names in ``state_dict``.
        *args: What else PyTorch hands to such a hook.

    Raises:
        RuntimeError: If the children of the module have no place for an entry.
    """
    own = module.state_dict()
    children = tuple(f'{prefix}{name}.' for name, _ in module.named_children())
    more = [
        key
        for key in state_dict
        if key.startswith(children) and key[len(prefix) :] not in own
    ]
    if more:
        raise RuntimeError(
            f'the checkpoint has {len(more)} entries that {type(module).__name__} '
            f'lacks, the first being {more[0]!r}: it is of another architecture; set '
            'arch to that of the checkpoint'
        )


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


def load_pretrained(module, path, prefix=None):
    """Load a module from a checkpoint, all of it, and report what was left.

    Args:
        module (nn.Module): The module.
        path (str): File or URL.
        prefix (str, optional): Of the module's names in the checkpoint, such as
            ``'backbone.'``.

    Raises:
        RuntimeError: If the module's entries are not all there, or do not fit.
        ValueError: If the file is no checkpoint, or holds non-finite numbers.
    """
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'the checkpoint {path} of init_cfg does not exist: correct '
            'init_cfg.checkpoint, or set init_cfg=None to start from random weights'
        ) from error
    try:
        state = state_dict_of(checkpoint)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    used = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    left = [k for k in state if not k.startswith(prefix)]
    try:
        result = module.load_state_dict(used, strict=False)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f'{path}: {error}') from error
    loaded = [k for k in used if k not in result.unexpected_keys]
    left += [prefix + k for k in result.unexpected_keys]
    lines = [
        f'{type(module).__name__}: loaded {len(loaded)} of {len(module.state_dict())} '
        f'entries from {path}: {_parts(loaded)}'
    ]
    if result.missing_keys:
        lines.append(f'not in the file: {", ".join(result.missing_keys)}')
    if left:
        lines.append(f'left in the file, not loaded: {_parts(left)}')
    print_log('\n  '.join(lines), logger='current')


def init_pretrained(module):
    """Load a module from the checkpoint that its ``init_cfg`` names, if it does.

    Args:
        module (BaseModule): The module.

    Returns:
        bool: Whether it was loaded.
    """
    cfg = module.init_cfg
    if not isinstance(cfg, dict) or cfg.get('type') not in (
        'Pretrained',
        PretrainedInit,
    ):
        return False
    load_pretrained(module, cfg['checkpoint'], cfg.get('prefix'))
    module._is_init = True
    return True


def _parts(names):
    """Names of weights by the module they are in, such as ``head.fc (2)``."""
    counts = Counter('.'.join(name.split('.')[:2][: name.count('.')]) for name in names)
    return ', '.join(f'{part} ({n})' for part, n in counts.items())
