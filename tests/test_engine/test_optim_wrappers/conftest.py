"""Trainings of six steps in which something goes wrong, and what they leave."""

import torch
from mmengine.hooks import Hook

from mdeq_mm.engine.hooks.failure_report_hook import FailureReportHook
from mdeq_mm.implicit import Status

from ..test_hooks.conftest import Watch, resumable, runner_in  # noqa: F401

EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=100)
LR = [0.01, 0.00875, 0.0075, 0.00625, 0.005, 0.005]


class Fault(Hook):
    """Injects a fault into some iterations, and takes it back after each.

    Args:
        inject (Callable): ``inject(runner, data_batch)``; may return a function
            that takes the fault back.
        iterations (Container[int]): Where.
    """

    def __init__(self, inject, iterations):
        self.inject, self.iterations, self.undo = inject, iterations, None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter in self.iterations:
            self.undo = self.inject(runner, data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.undo is not None:
            self.undo()
            self.undo = None


class Diary(Hook):
    """Notes the state before the first and after each iteration."""

    priority = 'VERY_HIGH'

    def before_train(self, runner):
        self.states = [_state(runner)]
        self.lr, self.counts = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.lr += runner.optim_wrapper.get_lr()['lr']

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.states.append(_state(runner))
        self.counts.append(runner.optim_wrapper.inner_count)

    def changed(self):
        """Which iterations changed the weights or the optimiser, from 0."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [i for i, (old, new) in enumerate(pairs) if not _same(old, new)]


def _state(runner):
    """Bits of all that a step changes: weights, buffers, momentum."""
    module = getattr(runner.model, 'module', runner.model)
    found = {k: v.clone() for k, v in module.state_dict().items()}
    for i, state in enumerate(runner.optim_wrapper.optimizer.state.values()):
        found |= {f'{i}.{k}': v.clone() for k, v in state.items() if torch.is_tensor(v)}
    return found


def _same(old, new):
    return old.keys() == new.keys() and all(
        torch.equal(old[k].nan_to_num(7.0), new[k].nan_to_num(7.0)) for k in old
    )


def training(folder, fault=None, at=(), report=True, hooks=(), model=None, **options):
    """A Runner with a policy, and its diary.

    Args:
        folder (Path): Of the work.
        fault (Callable, optional): See :class:`Fault`.
        at (Container[int]): Iterations with the fault.
        report (bool): Whether there is a FailureReportHook.
        hooks (Sequence[Hook]): More of them.
        model (nn.Module, optional): In place of the small classifier.
        **options: Of the wrapper.
    """
    diary = Diary()
    hooks = [diary, *hooks]
    if fault:
        hooks.append(Fault(fault, at))
    if report:
        hooks.append(FailureReportHook())
    # Weights of the same random numbers, for runs that are compared.
    runner = runner_in(folder, hooks, EPOCHS, model, randomness=dict(seed=0))
    runner.optim_wrapper = (
        dict(
            type='EquilibriumOptimWrapper',
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
        )
        | options
    )
    runner.param_schedulers = [
        dict(type='LinearLR', start_factor=1.0, end_factor=0.5, by_epoch=False, end=5)
    ]
    # It looks at solutions, which a model without a layer has none of.
    runner._hooks = [h for h in runner._hooks if not isinstance(h, Watch)]
    return runner, diary


# Faults


def layer_of(runner):
    model = getattr(runner.model, 'module', runner.model)
    return model.backbone.equilibrium


def image(value):
    def inject(runner, data_batch):
        data_batch['inputs'][0, 0, 0, 0] = value

    return inject


def weight(name, value=float('nan')):
    def inject(runner, data_batch):
        parameter = runner.model.get_parameter(name)
        with torch.no_grad():
            parameter.view(-1)[0] = value

    return inject


def gradient(value):
    def inject(runner, data_batch):
        weight = runner.model.head.weight
        return weight.register_hook(lambda grad: grad + value).remove

    return inject


def forward_status(status=Status.DIVERGED, residual=None):
    """Marks the first sample's forward solve."""

    def inject(runner, data_batch):
        def mark(layer, inputs, output):
            layer.last_solution.status[0] = status
            if residual is not None:
                layer.last_solution.residual[0] = residual

        return layer_of(runner).register_forward_hook(mark).remove

    return inject


def adjoint_status(status=Status.DIVERGED, residual=None):
    """Marks the first sample's backward solve."""

    def inject(runner, data_batch):
        gradient = layer_of(runner).gradient
        solve = gradient._adjoint

        def marked(*args):
            y, solution = solve(*args)
            solution.status[0] = status
            if residual is not None:
                solution.residual[0] = residual
            return y, solution

        gradient._adjoint = marked
        return lambda: vars(gradient).pop('_adjoint')

    return inject


def solver_step(runner, data_batch):
    """The solver's steps are NaN."""
    solver = layer_of(runner).solver
    solver.step = lambda state, z, fz: torch.full_like(z, float('nan'))
    return lambda: vars(solver).pop('step')


def f_output(runner, data_batch):
    """f is NaN for the first sample."""
    layer = layer_of(runner)
    measure = layer.solver.measure

    def spoiled(z, fz):
        residual = measure(z, fz)
        residual[0] = float('inf')
        return residual

    layer.solver.measure = spoiled
    return lambda: vars(layer.solver).pop('measure')
