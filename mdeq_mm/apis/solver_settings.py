"""Limit and tolerance of the solves in evaluation, set when they are needed."""

import copy

from torch import nn

from ..implicit.checks import check_amount, check_int
from ..implicit.layer import equilibrium_layers


class SolverSettings:
    """What :func:`set_solver` changed, and can be taken back.

    Leaving it as a context manager restores what held before the call. Nested ones
    have to be restored in the reverse order, as ``with`` does.

    Args:
        before (list[tuple[EquilibriumLayer, Solver]]): Layers with the evaluation
            solvers that they had.
    """

    def __init__(self, before):
        self._before = before

    def restore(self):
        """Put back the solvers of before the call; a second time does nothing."""
        while self._before:
            layer, solver = self._before.pop()
            layer.eval_solver = solver

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.restore()


def set_solver(model, max_steps=None, tol=None):
    """Set how the solves in evaluation end; training keeps its own settings.

    It holds from the call on: for good, or, where the result is used as a context
    manager, until that is left.

    Args:
        model (nn.Module | object): A model, wrapped for distributed training or not,
            or what has one as ``model``, such as an inferencer or a Runner.
        max_steps (int, optional): Most evaluations of f a sample may take. Default:
            as it is.
        tol (float, optional): Residual below which a sample is done; 0 always takes
            ``max_steps`` evaluations. Default: as it is.

    Returns:
        SolverSettings: A context manager that restores what held before.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range, the model has no
            equilibrium, or it is unrolled and does not solve at all.

    Example:
        >>> import mdeq_mm
        >>> model = mdeq_mm.get_model('mdeq-digits', device='cpu')
        >>> setting = mdeq_mm.set_solver(model, max_steps=12)  # from here on
        >>> with mdeq_mm.set_solver(model, max_steps=4, tol=1e-2):
        ...     model.backbone.equilibrium.eval_solver.max_steps
        4
        >>> model.backbone.equilibrium.eval_solver.max_steps
        12
    """
    if max_steps is not None:
        check_int('max_steps', max_steps, 1)
    if tol is not None:
        check_amount('tol', tol)
    if not isinstance(model, nn.Module):
        owner, model = model, getattr(model, 'model', None)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f'model is a {type(owner).__name__}: give a model, or an inferencer '
                'or Runner that has one'
            )
    layers = equilibrium_layers(model)
    if not layers:
        raise ValueError(
            f'model={type(model).__name__} has no equilibrium to solve for: give one '
            "whose backbone is of type='MDEQ'"
        )
    for layer in layers:
        if layer.unroll_steps is not None:
            raise ValueError(
                f'unroll_steps={layer.unroll_steps} of the equilibrium layer takes the '
                'place of a solve: set it to None first'
            )
    before = [(layer, layer.eval_solver) for layer in layers]
    for layer in layers:
        # It may be the training solver too, or that of other models.
        layer.eval_solver = copy.copy(layer.eval_solver)
        if max_steps is not None:
            layer.eval_solver.max_steps = int(max_steps)
        if tol is not None:
            layer.eval_solver.tol = float(tol)
    return SolverSettings(before)
