from .hooks import CheckpointGuardHook, EquilibriumMonitorHook, UnrollWarmupHook

__all__ = ['CheckpointGuardHook', 'EquilibriumMonitorHook', 'UnrollWarmupHook']
