from .amp_equilibrium_optim_wrapper import AmpEquilibriumOptimWrapper
from .equilibrium_optim_wrapper import EquilibriumOptimWrapper
from .failure import EquilibriumFailure
from .failure_policy import FailurePolicy

__all__ = [
    'AmpEquilibriumOptimWrapper',
    'EquilibriumFailure',
    'EquilibriumOptimWrapper',
    'FailurePolicy',
]
