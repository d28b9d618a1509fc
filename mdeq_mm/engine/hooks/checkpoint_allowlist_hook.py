"""Loading of Runner checkpoints by the toolboxes' own tools."""

from mmengine.hooks import Hook

from ...registry import HOOKS
from ...utils.checkpoint import allow_runner_checkpoints


@HOOKS.register_module()
class CheckpointAllowlistHook(Hook):
    """Lets torch load checkpoints of a Runner without running code from them.

    Since torch 2.6 ``torch.load`` refuses types that it does not know, mmengine's
    ``HistoryBuffer`` among them. The original mmengine then cannot test or resume
    at all; OneDL's falls back to a load that runs code from the file.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner):
        allow_runner_checkpoints()
