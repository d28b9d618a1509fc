"""Training that starts unrolled."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop

from ...implicit import EquilibriumLayer
from ...implicit.checks import check_int
from ...registry import HOOKS


def equilibrium_layers(model):
    """All equilibrium layers in a model, wrapped or not.

    Args:
        model (nn.Module): The model.

    Returns:
        list[EquilibriumLayer]: In the order of the model's modules.
    """
    if is_model_wrapper(model):
        model = model.module
    return [m for m in model.modules() if isinstance(m, EquilibriumLayer)]


@HOOKS.register_module()
class UnrollWarmupHook(Hook):
    """Trains unrolled at first, because a random f has no equilibrium to find.

    Until ``end``, equilibrium layers apply f ``unroll_steps`` times and
    differentiate through all of them, in training and in validation; then they
    solve. What applies follows from the Runner's iteration or epoch, so it is
    right after a resume too. Testing a checkpoint always solves.

    Args:
        unroll_steps (int): Applications of f in the unrolled phase.
        end (int): First iteration (or epoch) that solves; 0 never unrolls.
        by_epoch (bool): Whether ``end`` counts epochs.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is out of range, the model has no equilibrium
            layer, or epochs are counted that the training loop does not have.
    """

    priority = 'VERY_HIGH'

    def __init__(self, unroll_steps=5, end=0, by_epoch=False):
        check_int('UnrollWarmupHook.unroll_steps', unroll_steps, 1)
        check_int('UnrollWarmupHook.end', end, 0)
        self.unroll_steps = unroll_steps
        self.end = end
        self.by_epoch = by_epoch
        self._unrolled = None

    def before_train(self, runner):
        if not equilibrium_layers(runner.model):
            raise ValueError(
                'UnrollWarmupHook is set, but the model has no equilibrium layer: '
                "remove the hook, or use a backbone of type='MDEQ'"
            )
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f'UnrollWarmupHook.by_epoch=True with end={self.end} has no meaning '
                'under train_cfg.by_epoch=False, which counts no epochs: give the '
                'iteration, with by_epoch=False'
            )
        last = runner.max_epochs if self.by_epoch else runner.max_iters
        if 0 < last <= self.end:
            runner.logger.warning(
                f'UnrollWarmupHook.end={self.end} is not reached in this training of '
                f'{last}: it is unrolled to the end, and never solves.'
            )
        self._apply(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._apply(runner)

    def after_train(self, runner):
        self._unrolled = None
        self._set(runner, False)

    def _apply(self, runner):
        self._set(runner, (runner.epoch if self.by_epoch else runner.iter) < self.end)

    def _set(self, runner, unrolled):
        if unrolled == self._unrolled:
            return
        for layer in equilibrium_layers(runner.model):
            layer.unroll_steps = self.unroll_steps if unrolled else None
        if unrolled:
            unit = 'epoch' if self.by_epoch else 'iteration'
            runner.logger.info(
                f'Training unrolled, {self.unroll_steps} evaluations of f, '
                f'until {unit} {self.end}.'
            )
        elif self._unrolled:
            runner.logger.info(
                f'Training at the equilibrium from iteration {runner.iter} on.'
            )
        self._unrolled = unrolled
