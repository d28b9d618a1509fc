from .checkpoint_allowlist_hook import CheckpointAllowlistHook
from .equilibrium_monitor_hook import EquilibriumMonitorHook
from .unroll_warmup_hook import UnrollWarmupHook

__all__ = ['CheckpointAllowlistHook', 'EquilibriumMonitorHook', 'UnrollWarmupHook']
