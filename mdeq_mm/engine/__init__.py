from .hooks import CheckpointAllowlistHook, EquilibriumMonitorHook, UnrollWarmupHook

__all__ = ['CheckpointAllowlistHook', 'EquilibriumMonitorHook', 'UnrollWarmupHook']
