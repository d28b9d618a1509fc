"""What a checkpoint holds, and whether it fits into a module."""

from collections import Counter

import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit

from ..registry import name_of
from .reading import read_checkpoint


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
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    # By its name, as a class, or as mmengine writes a class into files.
    if name_of(kind) not in ('Pretrained', PretrainedInit.__name__):
        return False
    load_pretrained(module, cfg['checkpoint'], cfg.get('prefix'))
    module._is_init = True
    return True


def _parts(names):
    """Names of weights by the module they are in, such as ``head.fc (2)``."""
    counts = Counter('.'.join(name.split('.')[:2][: name.count('.')]) for name in names)
    return ', '.join(f'{part} ({n})' for part, n in counts.items())
