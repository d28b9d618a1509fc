from .equilibrium_metric import EquilibriumMetric

__all__ = ['EquilibriumMetric']
