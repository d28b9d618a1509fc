"""Reading checkpoints safely, what fits into what, and files that stay whole."""

from .checkpoint_guard_hook import CheckpointGuardHook
from .fitting import (
    check_finite,
    check_no_more,
    check_resumable,
    check_state_dict,
    init_pretrained,
    state_dict_of,
)
from .reading import allow_runner_checkpoints, load_from_local, read_checkpoint

__all__ = [
    'CheckpointGuardHook',
    'allow_runner_checkpoints',
    'check_finite',
    'check_no_more',
    'check_resumable',
    'check_state_dict',
    'init_pretrained',
    'load_from_local',
    'read_checkpoint',
    'state_dict_of',
]
