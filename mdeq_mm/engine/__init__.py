from .hooks import (
    EquilibriumCaptionHook,
    EquilibriumMonitorHook,
    FailureReportHook,
    JacobianScheduleHook,
    SolverScheduleHook,
    UnrollWarmupHook,
)
from .metrics import EquilibriumMetric
from .optim_wrappers import (
    AmpEquilibriumOptimWrapper,
    EquilibriumFailure,
    EquilibriumOptimWrapper,
)

__all__ = [
    'AmpEquilibriumOptimWrapper',
    'EquilibriumCaptionHook',
    'EquilibriumFailure',
    'EquilibriumMetric',
    'EquilibriumMonitorHook',
    'EquilibriumOptimWrapper',
    'FailureReportHook',
    'JacobianScheduleHook',
    'SolverScheduleHook',
    'UnrollWarmupHook',
]
