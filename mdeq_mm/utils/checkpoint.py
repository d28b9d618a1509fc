"""Reading checkpoints without running code from them, and refusing misfits.

A checkpoint of a Runner holds more than tensors: mmengine's ``HistoryBuffer`` with
numpy arrays. Torch reads such a file without running code from it only if these
types are on its list of allowed ones.
"""

import os
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader

_METHODS = ('min', 'max', 'current', 'mean')


def _history_method(owner, name):
    """What a pickled ``getattr`` may do: fetch a statistic of HistoryBuffer."""
    if owner is not HistoryBuffer or name not in _METHODS:
        raise ValueError(
            f'the checkpoint asks for {name!r} of {owner!r}, which no checkpoint of a '
            'Runner does: do not load it'
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
    allowed = [HistoryBuffer, np.ndarray, np.dtype]
    allowed.append((_history_method, 'builtins.getattr'))
    for home in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed.append((multiarray._reconstruct, f'{home}._reconstruct'))
        allowed.append((multiarray.scalar, f'{home}.scalar'))
    numbers = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    allowed += [type(np.dtype(n)) for n in numbers]
    return allowed


def allow_runner_checkpoints():
    """Let ``torch.load(weights_only=True)`` read checkpoints of a Runner.

    Changes a setting of the whole process, so it is called by tools and by
    :class:`CheckpointGuardHook`, not on import.
    """
    torch.serialization.add_safe_globals(allowed_types())


@contextmanager
def _weights_only():
    """Allow what Runner checkpoints hold, and nothing beyond it.

    ``torch.serialization.safe_globals`` would take back, on leaving, what was
    allowed before.
    """
    name = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    variable = os.environ.get(name)
    allowed = torch.serialization.get_safe_globals()
    os.environ[name] = '1'
    try:
        torch.serialization.add_safe_globals(allowed_types())
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


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
    try:
        with _weights_only():
            checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or ['no reason given'])[0]
        raise ValueError(
            f'{path} cannot be read as a checkpoint '
            f'({type(error).__name__}: {reason}): it is damaged, of another format, '
            'or holds objects that only code in the file could make; save its state '
            'dict alone'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path} holds a {type(checkpoint).__name__}, not a dict: save the '
            "model's state_dict()"
        )
    return checkpoint


def state_dict_of(checkpoint):
    """The state dict within a checkpoint, whatever wraps it.

    Args:
        checkpoint (dict): A state dict, or a dict with one under ``state_dict``
            or ``model``.

    Returns:
        dict[str, Tensor]: Without the ``module.`` that parallel wrappers put in
        front of all names.

    Raises:
        ValueError: If its keys are no names.
    """
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
        ValueError: If entries are not finite.
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
        if found is None:
            continue
        if found.shape != value.shape:
            raise RuntimeError(
                f'{prefix + key} has shape {tuple(found.shape)} in the checkpoint and '
                f'{tuple(value.shape)} in {name}: set its channels to those of the '
                'checkpoint (arch for a backbone)'
            )
    check_finite({prefix + k: state_dict.get(prefix + k) for k in own})


def check_finite(state_dict):
    """Refuse a state dict with numbers that are not finite.

    Args:
        state_dict (dict): Names to tensors; other entries are passed over.

    Raises:
        ValueError: Naming the first such entry.
    """
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if not value.isfinite().all():
            raise ValueError(
                f'{key} holds non-finite numbers in the checkpoint: take an earlier one'
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
    if not isinstance(cfg, dict) or cfg.get('type') != 'Pretrained':
        return False
    load_pretrained(module, cfg['checkpoint'], cfg.get('prefix'))
    module._is_init = True
    return True


def _parts(names):
    """Names of weights by the module they are in, such as ``head.fc (2)``."""
    counts = Counter('.'.join(name.split('.')[:2][: name.count('.')]) for name in names)
    return ', '.join(f'{part} ({n})' for part, n in counts.items())
