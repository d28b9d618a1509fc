"""Logging of what the solvers do."""

import torch
from mmengine.hooks import Hook

from ...implicit import Status
from ...implicit.checks import check_int
from ...registry import HOOKS
from .unroll_warmup_hook import equilibrium_layers


@HOOKS.register_module()
class EquilibriumMonitorHook(Hook):
    """Logs evaluations, residuals and converged shares of the solves in training.

    They are scalars in mmengine's message hub, so that every log and every
    visualization backend shows them beside the loss: ``eq_steps`` (mean
    evaluations of f), ``eq_residual`` (median), ``eq_residual_log10`` and
    ``eq_converged`` (share of the samples) of the forward solve, and the same
    with ``adjoint`` in place of ``eq`` of the backward solve. Models
    without an equilibrium layer log nothing.

    Args:
        interval (int): Iterations between two readings; reading waits for the
            device.
    """

    priority = 'NORMAL'

    def __init__(self, interval=10):
        check_int('EquilibriumMonitorHook.interval', interval, 1)
        self.interval = interval

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.every_n_train_iters(runner, self.interval):
            return
        layers = equilibrium_layers(runner.model)
        for i, layer in enumerate(layers):
            solution = layer.last_solution
            if solution is None:
                continue
            number = str(i) if len(layers) > 1 else ''
            _log(runner.message_hub, f'eq{number}', solution)
            if solution.adjoint is not None:
                _log(runner.message_hub, f'adjoint{number}', solution.adjoint)


def _log(hub, name, solution):
    converged = (solution.status == Status.CONVERGED).float().mean()
    hub.update_scalar(f'train/{name}_steps', solution.steps.float().mean().item())
    residual = solution.residual.median()
    hub.update_scalar(f'train/{name}_residual', residual.item())
    # The console shows four decimals, too few for a small residual.
    tiny = torch.finfo(residual.dtype).tiny
    log10 = residual.clamp_min(tiny).log10().item()
    hub.update_scalar(f'train/{name}_residual_log10', log10)
    hub.update_scalar(f'train/{name}_converged', converged.item())
