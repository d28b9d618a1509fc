from .checkpoint_guard_hook import CheckpointGuardHook
from .equilibrium_monitor_hook import EquilibriumMonitorHook
from .unroll_warmup_hook import UnrollWarmupHook

__all__ = ['CheckpointGuardHook', 'EquilibriumMonitorHook', 'UnrollWarmupHook']
