"""The shared inverse of forward and backward solve."""

from functools import partial

import torch

from ..checks import check_share
from ..solution import Solution, Status
from ..solvers import BroydenSolver, build_solver
from ..solvers.base import check_backward, residual_of
from ..solvers.rows import combine, project
from .base import Gradient, equilibrium, infinite, unit

_FALLBACK = dict(type='BroydenSolver', max_steps=10, tol=1e-2)


class SharedInverseGradient(Gradient):
    """SHINE: the forward solve's inverse serves the backward pass (Ramzi et al. 2022).

    Broyden's method ends with an estimate of the inverse of J - I, good along the
    steps that the solve took. Its transpose gives the adjoint y = J' y + g without
    an evaluation of f. One product with J' then refines the estimate, and tells how
    good it was: the residual ||J' y + g - y|| / ||J' y + g|| of the adjoint
    equation. For samples where that exceeds ``limit``, a solver goes on from the
    refined estimates.

    The updates of the forward solve are kept until the backward pass.

    Args:
        limit (float): Residual above which the fallback solves on, in (0, 1].
        fallback (dict | Solver | None): Solver of the backward pass for such
            samples; its norm must be 'rel'. None takes the estimate in any case.

    Raises:
        ValueError: If ``limit`` is out of range, or the backward pass cannot use
            the fallback.
    """

    def __init__(self, limit=0.2, fallback=_FALLBACK):
        check_share('limit', limit)
        self.limit = float(limit)
        self.fallback = None if fallback is None else build_solver(fallback, 'fallback')
        if self.fallback is not None:
            check_backward(self.fallback, 'fallback')

    def check(self, solver):
        """Refuse solvers that build no inverse."""
        if not isinstance(solver, BroydenSolver):
            raise ValueError(
                f'gradient SharedInverseGradient needs the inverse that '
                f'BroydenSolver builds, and solver is {type(solver).__name__}: use '
                "solver=dict(type='BroydenSolver'), or another gradient"
            )

    def __call__(self, equation, start, solver, trace=False):
        solution, state = solver.solve(equation, start, trace=trace, keep_state=True)
        history = solver.history(state)
        adjoint = partial(self._adjoint, equation.precision)
        return equilibrium(equation, solution, adjoint, history), solution

    def _adjoint(self, precision, product, grad, steps, residuals, small):
        direction, norm = unit(grad)
        y = direction + _transposed_part(direction, steps, residuals, small)
        y = torch.where(y.isfinite().all(1, keepdim=True), y, direction)
        refined = product(y) + direction
        residual = residual_of(y, refined)
        finite = refined.isfinite().all(1)
        met = torch.where(residual <= self.limit, Status.CONVERGED, Status.MAX_STEPS)
        solution = Solution(
            value=torch.where(finite[:, None], refined, torch.zeros_like(refined)),
            residual=torch.where(finite, residual, infinite(len(residual), residual)),
            steps=torch.ones_like(met),
            status=torch.where(finite, met, int(Status.DIVERGED)),
        )
        poor = ~(residual <= self.limit)
        if self.fallback is not None and poor.any():
            # An estimate that is worse than none would only mislead the solver.
            better = (residual < 1)[:, None]
            begin = torch.where(better, refined, direction)
            solved = self.fallback.solve(
                lambda y: product(y) + direction, begin, precision=precision
            )
            # The others keep theirs, whatever the samples beside them need: a
            # gradient must not depend on how a batch is spread over processes.
            solution = Solution(
                value=torch.where(poor[:, None], solved.value, solution.value),
                residual=torch.where(poor, solved.residual, solution.residual),
                steps=solution.steps + torch.where(poor, solved.steps, 0),
                status=torch.where(poor, solved.status, solution.status),
            )
        return solution.value * norm, solution


def _transposed_part(g, steps, residuals, small):
    """(H' g) without its identity part, of -B^-1 = I + G M^-1 S', M = small."""
    if steps.shape[1] == 0:
        return torch.zeros_like(g)
    # Samples that were done waited with steps of zero, whose rows of M are zero.
    idle = small.diagonal(dim1=1, dim2=2) == 0
    small = small + torch.diag_embed(idle.to(small.dtype))
    coefficients = project(residuals, g).double()
    weights = torch.linalg.solve_ex(small.mT, coefficients[:, :, None])[0].squeeze(2)
    usable = weights.isfinite().all(1, keepdim=True)
    weights = torch.where(usable, weights, torch.zeros_like(weights))
    return combine(steps, weights.to(g.dtype))
