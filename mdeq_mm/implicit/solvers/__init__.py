from ..build import register
from .anderson import AndersonSolver
from .base import Solver, build_solver
from .broyden import BroydenSolver
from .picard import PicardSolver

__all__ = [
    'AndersonSolver',
    'BroydenSolver',
    'PicardSolver',
    'Solver',
    'build_solver',
]

register('solver', AndersonSolver, BroydenSolver, PicardSolver)
