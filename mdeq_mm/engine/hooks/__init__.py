from .checkpoint_guard_hook import CheckpointGuardHook
from .data_guard_hook import DataGuardHook
from .equilibrium_caption_hook import EquilibriumCaptionHook
from .equilibrium_monitor_hook import EquilibriumMonitorHook
from .exact_resume_hook import ExactResumeHook
from .failure_report_hook import FailureReportHook
from .jacobian_schedule_hook import JacobianScheduleHook
from .multi_task_visualization_hook import MultiTaskSegVisualizationHook
from .solver_schedule_hook import SolverScheduleHook
from .unroll_warmup_hook import UnrollWarmupHook

__all__ = [
    'CheckpointGuardHook',
    'DataGuardHook',
    'EquilibriumCaptionHook',
    'EquilibriumMonitorHook',
    'ExactResumeHook',
    'FailureReportHook',
    'JacobianScheduleHook',
    'MultiTaskSegVisualizationHook',
    'SolverScheduleHook',
    'UnrollWarmupHook',
]
