from .hooks import (
    CheckpointGuardHook,
    DataGuardHook,
    EquilibriumMonitorHook,
    MultiTaskSegVisualizationHook,
    UnrollWarmupHook,
)
from .metrics import MultiTaskMetric

__all__ = [
    'CheckpointGuardHook',
    'DataGuardHook',
    'EquilibriumMonitorHook',
    'MultiTaskMetric',
    'MultiTaskSegVisualizationHook',
    'UnrollWarmupHook',
]
