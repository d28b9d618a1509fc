"""Registries of the package.

Models, hooks and metrics join mmengine's root registries, which resolve under
the scopes of mmpretrain and mmseg alike. Solvers and gradients have registries
of their own, which hold those of :mod:`mdeq_mm.implicit` and what users add.
"""

from mmengine.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    Registry,
)

from .implicit.build import TYPES

SOLVERS = Registry('solver', scope='mdeq_mm', locations=['mdeq_mm.implicit'])
GRADIENTS = Registry('gradient', scope='mdeq_mm', locations=['mdeq_mm.implicit'])
for registry in (SOLVERS, GRADIENTS):
    for cls in TYPES[registry.name].values():
        registry.register_module(module=cls)
    # What is registered later is built as well.
    TYPES[registry.name] = registry.module_dict

__all__ = [
    'DATASETS',
    'GRADIENTS',
    'HOOKS',
    'METRICS',
    'MODELS',
    'OPTIM_WRAPPERS',
    'SOLVERS',
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
