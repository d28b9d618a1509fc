"""Multiscale deep equilibrium models for the OpenMMLab toolboxes.

Importing the package registers its models, solvers, gradients and hooks, and
changes nothing else. It needs torch, mmengine and mmcv; mmpretrain and mmseg are
each optional.
"""

from .compat import check_installation
from .version import __version__

check_installation()

from . import checkpoints, data_guard, engine, models, multi_task, resume  # noqa: E402, F401
from .apis import (  # noqa: E402
    config_path,
    get_config,
    get_model,
    list_models,
    register_models,
    set_solver,
)
from .implicit import (  # noqa: E402
    AndersonSolver,
    BroydenSolver,
    EquilibriumLayer,
    ImplicitGradient,
    PhantomGradient,
    PicardSolver,
    ReversibleGradient,
    SharedInverseGradient,
    UnrolledGradient,
    equilibrium_layers,
)
from .models import MDEQ  # noqa: E402

__all__ = [
    'MDEQ',
    'AndersonSolver',
    'BroydenSolver',
    'EquilibriumLayer',
    'ImplicitGradient',
    'PhantomGradient',
    'PicardSolver',
    'ReversibleGradient',
    'SharedInverseGradient',
    'UnrolledGradient',
    '__version__',
    'config_path',
    'equilibrium_layers',
    'get_config',
    'get_model',
    'list_models',
    'register_models',
    'set_solver',
]


def __dir__():
    return __all__
