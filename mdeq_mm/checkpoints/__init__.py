"""Reading checkpoints safely, what fits into what, and files that stay whole."""

from .checkpoint_guard_hook import CheckpointGuardHook

__all__ = ['CheckpointGuardHook']
