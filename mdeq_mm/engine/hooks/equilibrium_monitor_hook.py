"""Logging of what the solvers do."""

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ...implicit import Status, spectral_radius
from ...implicit.checks import check_int
from ...implicit.layer import equilibrium_layers
from ...registry import HOOKS
from ..residual_plot import ResidualPlot


@HOOKS.register_module()
class EquilibriumMonitorHook(Hook):
    """Logs how the solves of a training end, and draws how they converge.

    Scalars go to mmengine's message hub, so that every log and every visualization
    backend shows them beside the loss. Of the forward solves, over all samples of
    an iteration: ``eq_steps`` (mean evaluations of f), ``eq_residual`` (median),
    ``eq_residual_p95``, both with ``_log10`` too, since the console shows four
    decimals; ``eq_converged``, ``eq_stalled``, ``eq_max_steps`` and
    ``eq_diverged``, shares of the samples. The same with ``adjoint`` in place of
    ``eq`` of the backward solves. ``eq_radius`` is the spectral radius of the
    Jacobian of f at one sample's equilibrium, by the power method: solvers and
    gradients work well below 1. Several layers have their numbers, ``eq0_steps``.

    After each validation the visualizer gets a picture of the residual over the
    evaluations, a line a quantile.

    Models without an equilibrium layer log nothing.

    Args:
        interval (int): Iterations between two readings; reading waits for the
            device.
        radius_interval (int): Iterations between two estimates of the spectral
            radius; 0 makes none.
        radius_iterations (int): Products with the Jacobian in an estimate.
        plot_samples (int): Most images of a validation in its picture; 0 draws
            none.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is out of range.
    """

    priority = 'NORMAL'

    def __init__(
        self, interval=10, radius_interval=500, radius_iterations=20, plot_samples=256
    ):
        name = type(self).__name__
        check_int(f'{name}.interval', interval, 1)
        check_int(f'{name}.radius_interval', radius_interval, 0)
        check_int(f'{name}.radius_iterations', radius_iterations, 2)
        check_int(f'{name}.plot_samples', plot_samples, 0)
        self.interval = interval
        self.radius_interval = radius_interval
        self.radius_iterations = radius_iterations
        self.plot_samples = plot_samples
        self._recorders, self._plots = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        # Left from an iteration that did not come to its end.
        self._stop()
        if self.every_n_train_iters(runner, self.interval):
            self._record(runner)
        if self.radius_interval and self.every_n_train_iters(
            runner, self.radius_interval
        ):
            # Reading is for the main process, the only one that logs.
            if is_main_process():
                self._watch_radius(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for recorder in self._recorders:
            for name, value in recorder.read().items():
                runner.message_hub.update_scalar(f'train/{name}', value)
        self._stop()

    def after_train(self, runner):
        self._stop()

    def before_val(self, runner):
        self._stop()
        if self.plot_samples:
            self._plots = [
                ResidualPlot(layer, self.plot_samples)
                for layer in equilibrium_layers(runner.model)
            ]

    def after_val_epoch(self, runner, metrics=None):
        for name, plot in zip(_names(len(self._plots)), self._plots, strict=True):
            plot.stop()
            if is_main_process() and plot.traces:
                picture = plot.draw(f'validation at iteration {runner.iter}')
                runner.visualizer.add_image(f'{name}_residual', picture, runner.iter)
        self._plots = []

    def _record(self, runner):
        layers = equilibrium_layers(runner.model)
        self._recorders += [
            _Solves(name, layer)
            for name, layer in zip(_names(len(layers)), layers, strict=True)
        ]

    def _watch_radius(self, runner):
        layers = equilibrium_layers(runner.model)
        self._recorders += [
            _Radius(name, layer, self.radius_iterations, runner.iter)
            for name, layer in zip(_names(len(layers)), layers, strict=True)
        ]

    def _stop(self):
        """Leave the layers as they were, whatever was under way."""
        for watcher in (*self._recorders, *self._plots):
            watcher.stop()
        self._recorders, self._plots = [], []


def _names(count):
    return ['eq'] if count == 1 else [f'eq{i}' for i in range(count)]


class _Solves:
    """Collects the solutions of one iteration, of all its forward passes."""

    def __init__(self, name, layer):
        self.name, self.solutions = name, []
        self._handle = layer.register_forward_hook(self._add)

    def _add(self, layer, inputs, output):
        if layer.training:
            # An iteration that was broken off leaves this here: keep no more than
            # one has.
            self.solutions = [*self.solutions[-15:], layer.last_solution]

    def stop(self):
        self._handle.remove()

    def read(self):
        found = _scalars(self.name, self.solutions)
        adjoints = [s.adjoint for s in self.solutions if s.adjoint is not None]
        return found | _scalars(self.name.replace('eq', 'adjoint'), adjoints)


class _Radius:
    """Estimates the spectral radius at the first sample of the next solve."""

    def __init__(self, name, layer, iterations, seed):
        self.name, self.layer = name, layer
        self.iterations, self.seed = iterations, seed
        self.value = None
        layer.inspect = self._look

    def _look(self, equation, solution):
        self.layer.inspect = None
        z = solution.value[:1]
        if not solution.residual[0].isfinite():
            return
        # Its own numbers, so that the training's stay what they are without it.
        generator = torch.Generator(z.device).manual_seed(self.seed)
        self.value = spectral_radius(
            equation.take(slice(0, 1)), z, self.iterations, generator
        )

    def stop(self):
        self.layer.inspect = None

    def read(self):
        return {} if self.value is None else {f'{self.name}_radius': self.value.item()}


def _scalars(name, solutions):
    """What is logged of some solves, by name."""
    if not solutions:
        return {}
    residual = torch.cat([s.residual for s in solutions]).float()
    status = torch.cat([s.status for s in solutions])
    steps = torch.cat([s.steps for s in solutions]).float()
    median = residual.median()
    # Not interpolated: a residual may be infinite.
    p95 = torch.quantile(residual, 0.95, interpolation='higher')
    tiny = torch.finfo(residual.dtype).tiny
    found = {
        'steps': steps.mean(),
        'residual': median,
        'residual_p95': p95,
        'residual_log10': median.clamp_min(tiny).log10(),
        'residual_p95_log10': p95.clamp_min(tiny).log10(),
    } | {s.name.lower(): (status == s).float().mean() for s in Status}
    # One transfer from the device for all of them.
    values = torch.stack(list(found.values())).tolist()
    return {f'{name}_{key}': value for key, value in zip(found, values, strict=True)}
