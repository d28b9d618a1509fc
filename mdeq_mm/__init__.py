"""Multiscale deep equilibrium models for the OpenMMLab toolboxes.

Importing the package registers its models, solvers, gradients and hooks, and
changes nothing else. It needs torch, mmengine and mmcv; mmpretrain and mmseg are
each optional.
"""

from .compat import check_installation
from .version import __version__

check_installation()

from . import datasets, engine, implicit, models  # noqa: E402
from .utils.solver_settings import set_solver  # noqa: E402
from .zoo import (  # noqa: E402
    config_path,
    get_config,
    get_model,
    list_models,
    register_models,
)

__all__ = [
    '__version__',
    'config_path',
    'datasets',
    'engine',
    'get_config',
    'get_model',
    'implicit',
    'list_models',
    'models',
    'register_models',
    'set_solver',
]
