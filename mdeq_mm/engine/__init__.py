from .hooks import (
    CheckpointGuardHook,
    DataGuardHook,
    EquilibriumMonitorHook,
    UnrollWarmupHook,
)
from .metrics import MultiTaskMetric

__all__ = [
    'CheckpointGuardHook',
    'DataGuardHook',
    'EquilibriumMonitorHook',
    'MultiTaskMetric',
    'UnrollWarmupHook',
]
