"""Tolerance and limit of the solvers over the course of a training."""

import copy

from mmengine.hooks import Hook

from ...implicit.checks import check_amount, check_flag, check_int
from ...implicit.layer import equilibrium_layers
from ...registry import HOOKS
from .layers import check_epochs, check_time, required_layers, resolve_time

_FIELDS = ('solver', 'gradient')
_ENTRIES = ('max_steps', 'tol')


@HOOKS.register_module()
class SolverScheduleHook(Hook):
    """Sets tolerance and limit of the solvers in training, by epoch or iteration.

    Early in a training an exact equilibrium of a poor f is worth little: few
    evaluations do, and more follow as f gets better. What applies follows from the
    Runner's epoch or iteration, so it is right after a resume too. Evaluation keeps
    the settings of the config.

    Args:
        milestones (list[dict]): Each with ``begin``, the first epoch (or
            iteration) that it holds for, or as a float a share of the training run,
            and ``solver`` (forward) or ``gradient`` (backward) or both: dicts with
            ``max_steps``, ``tol`` or both. What a milestone does not name stays as
            it was.
        by_epoch (bool): Whether ``begin`` counts epochs.

    Raises:
        TypeError: If milestones are no list of such dicts.
        ValueError: If their order is wrong, or a setting is unknown or unfit.

    Example:
        >>> from mdeq_mm.engine import SolverScheduleHook
        >>> hook = SolverScheduleHook([
        ...     dict(begin=0, solver=dict(max_steps=5)),
        ...     dict(begin=50, solver=dict(max_steps=8, tol=1e-3)),
        ... ])
    """

    priority = 'VERY_HIGH'

    def __init__(self, milestones, by_epoch=True):
        if not isinstance(milestones, list | tuple) or not milestones:
            raise TypeError(
                'SolverScheduleHook.milestones must be a list of dicts such as '
                f'dict(begin=0, solver=dict(max_steps=5)), got {milestones!r}'
            )
        check_flag('SolverScheduleHook.by_epoch', by_epoch)
        for i, milestone in enumerate(milestones):
            _check(f'SolverScheduleHook.milestones[{i}]', milestone)
        self.milestones = milestones
        self.by_epoch = by_epoch
        self._applied = 0
        self._begins = [milestone['begin'] for milestone in milestones]
        if len({isinstance(begin, float) for begin in self._begins}) == 1:
            self._check_order()

    def before_train(self, runner):
        layers = required_layers(runner, self)
        check_epochs(runner, self)
        for layer in layers:
            # Solvers may be shared, with evaluation and between them.
            layer.solver = copy.copy(layer.solver)
            layer.gradient = copy.copy(layer.gradient)
            if getattr(layer.gradient, 'solver', None) is not None:
                layer.gradient.solver = copy.copy(layer.gradient.solver)
        self._check_gradients(layers)
        self._begins = [
            resolve_time(milestone['begin'], runner, self.by_epoch)
            for milestone in self.milestones
        ]
        self._check_order()
        self._applied = 0
        self._apply(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._apply(runner)

    def _check_order(self):
        if self._begins != sorted(set(self._begins)):
            raise ValueError(
                f'SolverScheduleHook.milestones begin at {self._begins}: give them in '
                'ascending order, each once'
            )

    def _check_gradients(self, layers):
        for milestone in self.milestones:
            for layer in layers:
                if 'gradient' in milestone and not hasattr(layer.gradient, 'solver'):
                    raise ValueError(
                        'SolverScheduleHook.milestones name gradient, but '
                        f'{type(layer.gradient).__name__} has no solver: leave it out'
                    )

    def _apply(self, runner):
        now = runner.epoch if self.by_epoch else runner.iter
        begun = sum(begin <= now for begin in self._begins)
        for number in range(self._applied, begun):
            milestone = self.milestones[number]
            for layer in equilibrium_layers(runner.model):
                for field in _FIELDS:
                    target = layer.solver if field == 'solver' else layer.gradient
                    if field == 'gradient':
                        target = getattr(target, 'solver', None)
                    for name, value in milestone.get(field, {}).items():
                        setattr(target, name, value)
            unit = 'epoch' if self.by_epoch else 'iteration'
            told = [f'{f} {dict(milestone[f])}' for f in _FIELDS if f in milestone]
            runner.logger.info(
                f'From {unit} {self._begins[number]} on: {", ".join(told)}.'
            )
        self._applied = begun


def _check(field, milestone):
    if not hasattr(milestone, 'items') or 'begin' not in milestone:
        raise TypeError(f'{field} must be a dict with begin, got {milestone!r}')
    check_time(f'{field}.begin', milestone['begin'])
    unknown = sorted(set(milestone) - {'begin', *_FIELDS}, key=str)
    if unknown:
        raise ValueError(f'{field} has the unknown key {unknown[0]!r}: use {_FIELDS}')
    for name in _FIELDS:
        entries = milestone.get(name, {})
        if not hasattr(entries, 'items'):
            raise TypeError(
                f'{field}.{name} must be a dict with {" or ".join(_ENTRIES)}, got '
                f'{entries!r}'
            )
        for key, value in entries.items():
            if key not in _ENTRIES:
                raise ValueError(
                    f'{field}.{name} has the unknown key {key!r}: use {_ENTRIES}'
                )
            if key == 'max_steps':
                check_int(f'{field}.{name}.max_steps', value, 1)
            else:
                check_amount(f'{field}.{name}.tol', value)
