from .checkpoint_guard_hook import CheckpointGuardHook
from .data_guard_hook import DataGuardHook
from .equilibrium_monitor_hook import EquilibriumMonitorHook
from .multi_task_visualization_hook import MultiTaskSegVisualizationHook
from .solver_schedule_hook import SolverScheduleHook
from .unroll_warmup_hook import UnrollWarmupHook

__all__ = [
    'CheckpointGuardHook',
    'DataGuardHook',
    'EquilibriumMonitorHook',
    'MultiTaskSegVisualizationHook',
    'SolverScheduleHook',
    'UnrollWarmupHook',
]
