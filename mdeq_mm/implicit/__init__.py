"""The mathematics of equilibrium models; knows torch alone."""

from .equation import Equation
from .functional import FunctionalModule
from .gradients import (
    Gradient,
    ImplicitGradient,
    PhantomGradient,
    ReversibleGradient,
    SharedInverseGradient,
    UnrolledGradient,
    build_gradient,
)
from .jacobian import hutchinson, spectral_radius
from .layer import EquilibriumLayer, equilibrium_layers
from .solution import Solution, Status
from .solvers import (
    AndersonSolver,
    BroydenSolver,
    PicardSolver,
    Solver,
    build_solver,
)
from .state import StateSpec

__all__ = [
    'AndersonSolver',
    'BroydenSolver',
    'Equation',
    'EquilibriumLayer',
    'FunctionalModule',
    'Gradient',
    'ImplicitGradient',
    'PhantomGradient',
    'PicardSolver',
    'ReversibleGradient',
    'SharedInverseGradient',
    'Solution',
    'Solver',
    'StateSpec',
    'Status',
    'UnrolledGradient',
    'build_gradient',
    'build_solver',
    'equilibrium_layers',
    'hutchinson',
    'spectral_radius',
]
