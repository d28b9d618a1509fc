"""Registries of the package, and how entries of the two own ones are built.

Models, hooks and metrics join mmengine's root registries, which resolve under
the scopes of mmpretrain and mmseg alike. Solvers and gradients have registries
of their own.
"""

import inspect
import re

from mmengine.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    Registry,
)
from mmengine.utils import get_object_from_string

SOLVERS = Registry('solver', scope='mdeq_mm', locations=['mdeq_mm.implicit'])
GRADIENTS = Registry('gradient', scope='mdeq_mm', locations=['mdeq_mm.implicit'])

__all__ = [
    'DATASETS',
    'GRADIENTS',
    'HOOKS',
    'METRICS',
    'MODELS',
    'OPTIM_WRAPPERS',
    'SOLVERS',
    'build_from',
    'name_of',
]


def name_of(kind):
    """Name of a type in a config, without what stands before it.

    Args:
        kind (str | type): A registered name, with or without a scope, the path of a
            class as mmengine writes it into files, or the class.

    Returns:
        str: Such as ``'MDEQ'`` for ``'mdeq_mm.models.MDEQ'``.
    """
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
    return name.rpartition('.')[2]


def build_from(registry, cfg, field):
    """Build an entry of :data:`SOLVERS` or :data:`GRADIENTS` from its config.

    ``Registry.build`` looks for the current default scope first, and logs a
    failed search whenever that scope is mmpretrain's or mmseg's. Solvers and
    gradients have one registry, so this looks there and nowhere else.

    Args:
        registry (Registry): Where the name is looked up.
        cfg (dict | object): ``dict(type=..., **arguments)``, or an object that
            was built already and is returned as it is.
        field (str): Name of the config field, for messages.

    Returns:
        object: An instance of the registered class.

    Raises:
        TypeError: If ``cfg`` is no dict with a ``type``, or holds arguments
            that the class does not take.
        ValueError: If the type is not registered.
    """
    known = registry.module_dict
    if isinstance(cfg, tuple(known.values())):
        return cfg
    if not hasattr(cfg, 'items') or 'type' not in cfg:
        raise TypeError(
            f'{field} must be a dict with a type, one of {sorted(known)}, got {cfg!r}'
        )
    arguments = dict(cfg)
    kind = arguments.pop('type')
    if isinstance(kind, str):
        # Registered names may carry the scope, as everywhere in OpenMMLab.
        cls = known.get(kind.removeprefix('mdeq_mm.'))
        if cls is None and re.fullmatch(r'\w+(\.\w+)+', kind):
            # As mmengine writes a class of a config in Python into its files. Where
            # its module is new, the import registers it.
            cls = get_object_from_string(kind)
    else:
        cls = kind
    if cls is None or cls not in known.values():
        raise ValueError(
            f'{field}.type={kind!r} is not a registered {registry.name}: use one of '
            f'{sorted(known)}, or register yours and name its module in custom_imports'
        )
    takes = inspect.signature(cls).parameters
    unknown = sorted(map(str, set(arguments) - set(takes)))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise TypeError(
            f'{field} ({cls.__name__}) has no argument {", ".join(unknown)}: it takes '
            f'{", ".join(takes) or "none"}'
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        # Which of several solvers it was: messages start with the argument.
        name = re.match(r'\w*', str(error))[0]
        link = '.' if name in takes else ': '
        raise type(error)(f'{field}{link}{error}') from error
