"""What reading checkpoints safely changes for a process, and how it is taken back."""

import os
from contextlib import contextmanager

import mmengine
import torch
from mmengine.runner.checkpoint import CheckpointLoader


@contextmanager
def taken_back():
    """Take back what hook and tools change for the whole process."""
    home = mmengine.runner.checkpoint
    variables = {k: v for k, v in os.environ.items() if k.startswith('TORCH_FORCE')}
    allowed = torch.serialization.get_safe_globals()
    listed = getattr(home, 'get_torch_safe_globals', None)
    yield
    for key in [k for k in os.environ if k.startswith('TORCH_FORCE')]:
        del os.environ[key]
    os.environ.update(variables)
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    if listed is not None:
        home.get_torch_safe_globals = listed
    for prefixes, loader in (
        ('', home.load_from_local),
        (['http://', 'https://'], home.load_from_http),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
