"""Multiscale deep equilibrium models for the OpenMMLab toolboxes.

Importing the package registers its models, solvers, gradients and hooks, and
changes nothing else. It needs torch, mmengine and mmcv; mmpretrain and mmseg are
each optional.
"""

from .compat import check_installation
from .version import __version__

check_installation()

from . import datasets, engine, implicit, models  # noqa: E402

__all__ = ['__version__', 'datasets', 'engine', 'implicit', 'models']
