"""Implicit differentiation."""

import torch

from ...registry import GRADIENTS
from ..solvers import build_solver
from .base import Gradient, equilibrium, unit

_DEFAULT = dict(type='BroydenSolver', max_steps=30, tol=1e-6)


@GRADIENTS.register_module()
class ImplicitGradient(Gradient):
    """The exact gradient at the equilibrium, by the implicit function theorem.

    The backward pass solves y = J' y + dL/dz for the adjoint y (Bai et al. 2019),
    with products with the Jacobian of f at z*, and ends with one full product.
    The incoming gradient is scaled to unit norm a sample first, so that neither
    the loss scale of mixed precision nor a tiny loss reaches the solver.

    Args:
        solver (dict | Solver, optional): Solver of the backward pass; its norm
            must be 'rel'. Default: Broyden, 30 evaluations, tolerance 1e-6.

    Raises:
        ValueError: If the solver's norm is not 'rel'.
    """

    def __init__(self, solver=None):
        self.solver = build_solver(solver or _DEFAULT)
        if self.solver.norm != 'rel':
            raise ValueError(
                f'solver.norm={self.solver.norm!r} cannot be used: the '
                "backward solve runs on a gradient scaled to unit norm, use 'rel'"
            )

    def __call__(self, equation, start, solver, trace=False):
        solution = solver.solve(equation, start, trace=trace)
        return equilibrium(equation, solution, self._adjoint), solution

    def _adjoint(self, product, grad):
        direction, norm = unit(grad)
        solution = self.solver.solve(
            lambda y: product(y) + direction, torch.zeros_like(direction)
        )
        return solution.value * norm, solution
