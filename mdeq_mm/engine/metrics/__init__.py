from .equilibrium_metric import EquilibriumMetric
from .multi_task_metric import MultiTaskMetric

__all__ = ['EquilibriumMetric', 'MultiTaskMetric']
