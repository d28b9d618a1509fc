"""Safe loading of checkpoints by the toolboxes' own tools."""

from mmengine.hooks import Hook

from ...registry import HOOKS
from ...utils.checkpoint import allow_runner_checkpoints, check_finite, state_dict_of


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Lets checkpoints load without running code from them, if they are sound.

    Since torch 2.6 ``torch.load`` refuses types that it does not know, mmengine's
    ``HistoryBuffer`` among them. The original mmengine then cannot test or resume
    at all; OneDL's falls back to a load that runs code from the file. This hook
    puts what a Runner writes on torch's list of allowed types.

    A checkpoint with non-finite weights is refused, whatever it is loaded for.

    Raises:
        ValueError: On loading a checkpoint that holds non-finite weights.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner):
        allow_runner_checkpoints()

    def after_load_checkpoint(self, runner, checkpoint):
        check_finite(state_dict_of(checkpoint))
