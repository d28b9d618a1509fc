from .equilibrium_caption_hook import EquilibriumCaptionHook
from .equilibrium_monitor_hook import EquilibriumMonitorHook
from .failure_report_hook import FailureReportHook
from .jacobian_schedule_hook import JacobianScheduleHook
from .solver_schedule_hook import SolverScheduleHook
from .unroll_warmup_hook import UnrollWarmupHook

__all__ = [
    'EquilibriumCaptionHook',
    'EquilibriumMonitorHook',
    'FailureReportHook',
    'JacobianScheduleHook',
    'SolverScheduleHook',
    'UnrollWarmupHook',
]
