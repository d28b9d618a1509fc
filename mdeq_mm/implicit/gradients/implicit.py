"""Implicit differentiation."""

from functools import partial

import torch

from ..checks import check_flag
from ..solvers import build_solver
from ..solvers.base import check_backward
from .base import Gradient, equilibrium, unit

_DEFAULT = dict(type='BroydenSolver', max_steps=30, tol=1e-6)


class ImplicitGradient(Gradient):
    """The exact gradient at the equilibrium, by the implicit function theorem.

    The backward pass solves y = J' y + dL/dz for the adjoint y (Bai et al. 2019),
    with products with the Jacobian of f at z*, and ends with one full product.
    The incoming gradient is scaled to unit norm a sample first, so that neither
    the loss scale of mixed precision nor a tiny loss reaches the solver.

    Args:
        solver (dict | Solver, optional): Solver of the backward pass; its norm
            must be 'rel', and samples must stay in the batch. Default: Broyden, 30
            evaluations, tolerance 1e-6.
        warm_start (bool): Whether a backward solve starts from the adjoints of the
            one before, sample by sample, where the shapes are the same. That pays
            where consecutive steps see the same or similar samples in the same
            places, as in fitting one batch or a video. One state is kept between
            the steps for it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the backward pass cannot use the solver.
    """

    def __init__(self, solver=None, warm_start=False):
        self.solver = build_solver(_DEFAULT if solver is None else solver)
        check_backward(self.solver, 'solver')
        check_flag('warm_start', warm_start)
        self.warm_start = warm_start
        self._last = None

    def forget(self):
        self._last = None

    def __call__(self, equation, start, solver, trace=False):
        solution = solver.solve(equation, start, trace=trace)
        adjoint = partial(self._adjoint, equation.precision)
        return equilibrium(equation, solution, adjoint), solution

    def _adjoint(self, precision, product, grad):
        direction, norm = unit(grad)
        start = torch.zeros_like(direction)
        kept = self._last
        if self.warm_start and kept is not None:
            last, residual = kept
            if last.shape == start.shape and last.device == start.device:
                # One that was worse than zero would only mislead.
                start = torch.where((residual < 1)[:, None], last.to(start), start)
        solution = self.solver.solve(
            lambda y: product(y) + direction, start, precision=precision
        )
        if self.warm_start:
            self._last = solution.value, solution.residual
        return solution.value * norm, solution
