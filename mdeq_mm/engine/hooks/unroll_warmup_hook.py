"""Unrolled phase at the start of training."""

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook

from ...implicit.checks import check_amount, check_flag, check_int
from ...implicit.layer import equilibrium_layers
from ...registry import HOOKS
from .layers import check_epochs, check_time, required_layers, resolve_time

#: Of the state in the message hub, which checkpoints hold.
_STATE = 'unroll_warmup'


@HOOKS.register_module()
class UnrollWarmupHook(Hook):
    """Unrolled phase at the start of training, as the official models have it.

    Until ``end``, equilibrium layers apply f ``unroll_steps`` times and
    differentiate through all of them, in training and in validation; then they
    solve. What applies follows from the Runner's iteration or epoch, so it is
    right after a resume too. Testing a checkpoint always solves.

    With a ``threshold`` the unrolled phase ends earlier, once the equilibrium is
    there: when the residual of the unrolled iteration, the median over the samples
    of all processes' batches, averaged, is at most the threshold in ``readings``
    readings in a row. That it has ended is part of checkpoints.

    Args:
        unroll_steps (int): Applications of f in the unrolled phase.
        end (int | float): First iteration (or epoch) that solves at the latest; 0
            never unrolls. A float is a share of the training run, 0.5 being its
            first half, which is right for any number of GPUs, batch and length.
        by_epoch (bool): Whether ``end`` counts epochs.
        threshold (float, optional): Residual, relative, at which the phase may end
            before. Default: it does not.
        interval (int): Iterations between two readings.
        readings (int): See above.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is out of range, the model has no equilibrium
            layer, or epochs are counted that the training loop does not have.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        unroll_steps=5,
        end=0,
        by_epoch=False,
        threshold=None,
        interval=10,
        readings=5,
    ):
        check_int('UnrollWarmupHook.unroll_steps', unroll_steps, 1)
        check_time('UnrollWarmupHook.end', end)
        check_flag('UnrollWarmupHook.by_epoch', by_epoch)
        if threshold is not None:
            check_amount('UnrollWarmupHook.threshold', threshold)
            if threshold == 0 or end == 0:
                raise ValueError(
                    f'UnrollWarmupHook.threshold={threshold} with end={end} has no '
                    'effect: give a threshold above 0, and the last iteration at '
                    'which the unrolled phase may end'
                )
        check_int('UnrollWarmupHook.interval', interval, 1)
        check_int('UnrollWarmupHook.readings', readings, 1)
        self.threshold = threshold
        self.interval = interval
        self.readings = readings
        self._below, self._settled = 0, None
        self.unroll_steps = unroll_steps
        self.end = end
        self.by_epoch = by_epoch
        self._unrolled = None
        self._end = None

    def before_train(self, runner):
        required_layers(runner, self)
        check_epochs(runner, self)
        self._end = resolve_time(self.end, runner, self.by_epoch)
        if self.threshold is not None:
            # Of the checkpoint, where one is resumed.
            found = runner.message_hub.runtime_info.get(_STATE, {})
            self._below = found.get('below', 0)
            self._settled = found.get('settled')
        last = runner.max_epochs if self.by_epoch else runner.max_iters
        if 0 < last <= self._end and self.threshold is None:
            runner.logger.warning(
                f'UnrollWarmupHook.end={self.end} is not reached in this training run '
                f'of {last}: it is unrolled to the end, and never solves.'
            )
        self._apply(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._apply(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.threshold is None or not self._unrolled:
            return
        if self.every_n_train_iters(runner, self.interval):
            self._read(runner)

    def _read(self, runner):
        layers = equilibrium_layers(runner.model)
        residual = torch.stack([x.last_solution.residual.median() for x in layers])
        worst = residual.max().reshape(1)
        # All processes have to switch at once.
        all_reduce(worst, op='mean')
        self._below = self._below + 1 if worst.item() <= self.threshold else 0
        if self._below >= self.readings:
            self._settled = runner.iter + 1
            runner.logger.info(
                f'The residual of the unrolled iteration was at most {self.threshold} '
                f'in {self.readings} readings in a row ({worst.item():.2e} in the '
                'last): the equilibrium is there.'
            )
        state = dict(below=self._below, settled=self._settled)
        runner.message_hub.update_info(_STATE, state)

    def after_train(self, runner):
        self._unrolled = None
        self._set(runner, False)

    def _apply(self, runner):
        time = runner.epoch if self.by_epoch else runner.iter
        self._set(runner, time < self._end and self._settled is None)

    def _set(self, runner, unrolled):
        if unrolled == self._unrolled:
            return
        for layer in equilibrium_layers(runner.model):
            layer.unroll_steps = self.unroll_steps if unrolled else None
        if unrolled:
            unit = 'epoch' if self.by_epoch else 'iteration'
            early = ''
            if self.threshold is not None:
                early = f' or a residual of {self.threshold}'
            runner.logger.info(
                f'Training unrolled, {self.unroll_steps} evaluations of f, '
                f'until {unit} {self._end}{early}.'
            )
        elif self._unrolled:
            # In the unit of the line before, if it came as announced.
            by_epoch = self.by_epoch and self._settled is None
            when = (
                f'epoch {runner.epoch + 1}' if by_epoch else f'iteration {runner.iter}'
            )
            runner.logger.info(f'Training at the equilibrium from {when} on.')
        self._unrolled = unrolled
