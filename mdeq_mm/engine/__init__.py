from .hooks import (
    CheckpointGuardHook,
    DataGuardHook,
    EquilibriumCaptionHook,
    EquilibriumMonitorHook,
    ExactResumeHook,
    FailureReportHook,
    JacobianScheduleHook,
    MultiTaskSegVisualizationHook,
    SolverScheduleHook,
    UnrollWarmupHook,
)
from .metrics import EquilibriumMetric, MultiTaskMetric
from .optim_wrappers import (
    AmpEquilibriumOptimWrapper,
    EquilibriumFailure,
    EquilibriumOptimWrapper,
)

__all__ = [
    'AmpEquilibriumOptimWrapper',
    'CheckpointGuardHook',
    'DataGuardHook',
    'EquilibriumCaptionHook',
    'EquilibriumFailure',
    'EquilibriumMetric',
    'EquilibriumMonitorHook',
    'EquilibriumOptimWrapper',
    'ExactResumeHook',
    'FailureReportHook',
    'JacobianScheduleHook',
    'MultiTaskMetric',
    'MultiTaskSegVisualizationHook',
    'SolverScheduleHook',
    'UnrollWarmupHook',
]
