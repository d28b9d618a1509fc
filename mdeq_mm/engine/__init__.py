from .hooks import (
    CheckpointGuardHook,
    DataGuardHook,
    EquilibriumMonitorHook,
    MultiTaskSegVisualizationHook,
    SolverScheduleHook,
    UnrollWarmupHook,
)
from .metrics import MultiTaskMetric

__all__ = [
    'CheckpointGuardHook',
    'DataGuardHook',
    'EquilibriumMonitorHook',
    'MultiTaskMetric',
    'MultiTaskSegVisualizationHook',
    'SolverScheduleHook',
    'UnrollWarmupHook',
]
