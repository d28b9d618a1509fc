"""Building solvers and gradients from configs."""

import inspect
import re
from importlib import import_module

#: Classes by the names that configs use. The package's registries share these dicts.
TYPES = dict(solver={}, gradient={})


def register(kind, *classes):
    """Make classes known by their names.

    Args:
        kind (str): ``'solver'`` or ``'gradient'``.
        classes (type): The classes.
    """
    TYPES[kind].update({cls.__name__: cls for cls in classes})


def build(kind, cfg, field):
    """Build a solver or a gradient from its config.

    Args:
        kind (str): ``'solver'`` or ``'gradient'``.
        cfg (dict | object): ``dict(type=..., **arguments)``, or an object that
            was built already and is returned as it is.
        field (str): Name of the config field, for messages.

    Returns:
        Solver | Gradient: An instance of the registered class.

    Raises:
        TypeError: If ``cfg`` is no dict with a ``type``, or holds arguments
            that the class does not take.
        ValueError: If the type is not registered.
    """
    known = TYPES[kind]
    if isinstance(cfg, tuple(known.values())):
        return cfg
    if not hasattr(cfg, 'items') or 'type' not in cfg:
        raise TypeError(
            f'{field} must be a dict with a type, one of {sorted(known)}, got {cfg!r}'
        )
    arguments = dict(cfg)
    cls = name = arguments.pop('type')
    if isinstance(name, str):
        # Registered names may carry the scope, as everywhere in OpenMMLab.
        cls = known.get(name.removeprefix('mdeq_mm.')) or _imported(name)
    if cls is None or cls not in known.values():
        raise ValueError(
            f'{field}.type={name!r} is not a registered {kind}: use one of '
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
        first = re.match(r'\w*', str(error))[0]
        link = '.' if first in takes else ': '
        raise type(error)(f'{field}{link}{error}') from error


def _imported(path):
    """A class by its dotted path, as mmengine writes those of configs in Python.

    Where its module is new, the import registers it. None where there is none.
    """
    module, _, name = path.rpartition('.')
    if not re.fullmatch(r'\w+(\.\w+)*', module):
        return None
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None
