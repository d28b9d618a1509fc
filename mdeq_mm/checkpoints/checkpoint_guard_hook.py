"""Safe loading of checkpoints by the toolboxes' own tools."""

from mmengine.hooks import Hook

from ..registry import HOOKS
from .fitting import check_finite, state_dict_of
from .reading import allow_runner_checkpoints, unreadable_entries


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Lets checkpoints load without running code from them, if they are sound.

    Since torch 2.6 ``torch.load`` refuses types that it does not know, mmengine's
    ``HistoryBuffer`` among them. The original mmengine then cannot test or resume
    at all; OneDL's falls back to a load that runs code from the file. From the start
    of a run on, this hook lets the whole process, and those that it starts, read
    what a Runner writes, and nothing that would run code: see
    :func:`~mdeq_mm.checkpoints.allow_runner_checkpoints`.

    A checkpoint with non-finite weights is refused, whatever it is loaded for. What
    could not be read back is left out of a checkpoint where a resumed training makes
    it anew, the methods of schedules, and warned of where not.

    Raises:
        ValueError: On loading a checkpoint that holds non-finite weights, or none.
    """

    priority = 'VERY_HIGH'

    def __init__(self):
        self._warned = set()

    def before_run(self, runner):
        allow_runner_checkpoints()

    def after_load_checkpoint(self, runner, checkpoint):
        state = state_dict_of(checkpoint)
        check_finite(state)
        # mmengine looks for weights nowhere else.
        checkpoint.setdefault('state_dict', state)
        # A config of earlier versions, which mmengine would run as a program for
        # the number of GPUs in it.
        if isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)

    def before_save_checkpoint(self, runner, checkpoint):
        schedules = checkpoint.get('param_schedulers', [])
        groups = schedules.values() if isinstance(schedules, dict) else [schedules]
        for state in (state for group in groups for state in group):
            for key in [key for key, value in state.items() if callable(value)]:
                del state[key]
        unreadable = unreadable_entries(checkpoint)
        if not self._warned.issuperset(unreadable):
            self._warned.update(unreadable)
            runner.logger.warning(
                f'The checkpoint holds {len(unreadable)} entries that cannot be read '
                f'back without running code, so that neither tests nor resumed '
                f'trainings will load it: {", ".join(unreadable[:5])}; give numbers, '
                'texts, lists, dicts, tensors or numpy arrays in their place.'
            )


def guard_checkpoints(runner):
    """Give a runner a :class:`CheckpointGuardHook`, if its config names none.

    Args:
        runner (Runner): Before it runs.
    """
    if not any(isinstance(hook, CheckpointGuardHook) for hook in runner.hooks):
        runner.register_hook(CheckpointGuardHook())
