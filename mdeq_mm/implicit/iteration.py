"""A solver's iteration with a fixed number of evaluations of f, as one formula.

The loop of :class:`Solver` looks at its numbers to stop, writes in place and calls
LAPACK; graphs that are exported and transformations of ``torch.func`` can have none of
it. What is here is the same iteration without, at a tolerance of 0, in plain tensor
operations, which are the same at every step.
"""

import math

import torch
from torch import Tensor

from .checks import check_int
from .solvers import AndersonSolver, PicardSolver
from .solvers.base import finite_rows, residual_of
from .solvers.rows import combine


def fixed_solver(solver, steps=None, kind=None):
    """The solver whose iteration is exported in place of another one.

    Args:
        solver (Solver): Of the model, in evaluation.
        steps (int, optional): Evaluations of f. Default: the solver's limit.
        kind (str, optional): ``'anderson'`` or ``'picard'``. Default: the solver's
            own method, and Anderson acceleration in place of others, such as
            Broyden's.

    Returns:
        Solver: An ``AndersonSolver`` or ``PicardSolver`` with ``tol=0``, with the
        settings of ``solver`` where it is of that type, and in any case its norm.

    Raises:
        TypeError: If ``steps`` is no integer.
        ValueError: If ``steps`` is below 1, or the kind is unknown.
    """
    kinds = dict(anderson=AndersonSolver, picard=PicardSolver)
    if kind is None:
        kind = 'picard' if isinstance(solver, PicardSolver) else 'anderson'
    if kind not in kinds:
        raise ValueError(f"solver={kind!r} is unknown: use 'anderson' or 'picard'")
    steps = solver.max_steps if steps is None else steps
    check_int('steps', steps, 1)
    settings = dict(max_steps=steps, tol=0, norm=solver.norm)
    if isinstance(solver, kinds[kind]):
        own = dict(anderson=('memory', 'ridge', 'mixing'), picard=('damping',))[kind]
        settings |= {name: getattr(solver, name) for name in own}
    return kinds[kind](**settings)


class FixedIteration:
    """The steps of ``solver.solve`` at a tolerance of 0, all of them alike.

    A state is a tuple of tensors whose first dimension is the batch: the next
    iterate z (N, D), the best one so far, its residual (N,), whether the sample is
    still looked at; for Anderson acceleration the history too, the oldest entry first.

    Args:
        solver (AndersonSolver | PicardSolver): Its settings are used, not its loop.
        precision (torch.dtype): Of Anderson's small systems.
    """

    def __init__(self, solver, precision=torch.float64):
        self.solver, self.precision = solver, precision
        self.accelerated = isinstance(solver, AndersonSolver)

    def begin(self, start: Tensor):
        """The state before the first evaluation of f.

        Args:
            start (Tensor): (N, D), finite.
        """
        endless = torch.full_like(start[:, 0], math.inf)
        state = (start, start, endless, endless > 0)
        if not self.accelerated:
            return state
        n, dim = start.shape
        memory = min(self.solver.memory, self.solver.max_steps)
        history = start.new_zeros(n, memory, dim)
        gram = start.new_zeros(n, memory, memory, dtype=self.precision)
        return (*state, history, history, gram, gram[:, 0])

    def step(self, state, fz: Tensor):
        """The state after one more evaluation.

        Args:
            state (tuple[Tensor, ...]): The state before.
            fz (Tensor): (N, D), f at its first entry.

        Returns:
            tuple[Tensor, ...]: A state.
        """
        z, best, least, running = state[:4]
        solver = self.solver
        found = residual_of(z, fz, solver.norm)
        better = running & (found < least)
        best = torch.where(better[:, None], z, best)
        least = torch.where(better, found, least)
        # Samples that diverged go on, and are not looked at any more.
        running = running & found.isfinite()
        new, *history = self._advance(z, fz, *state[4:])
        new = torch.where(finite_rows(new)[:, None], new, fz)
        return new, best, least, running, *history

    def _advance(self, z, fz, *history):
        """The next iterate and the history with this one."""
        solver = self.solver
        if not self.accelerated:
            return (fz if solver.damping == 1 else z + solver.damping * (fz - z),)
        values, residuals, gram, used = history
        residual = (fz - z)[:, None]
        values = torch.cat([values[:, 1:], fz[:, None]], dim=1)
        residuals = torch.cat([residuals[:, 1:], residual], dim=1)
        row = (residuals * residual).sum(2).to(self.precision)
        gram = torch.cat([gram[:, 1:, 1:], row[:, :-1, None]], dim=2)
        gram = torch.cat([gram, row[:, None]], dim=1)
        used = torch.cat([used[:, 1:], torch.ones_like(used[:, :1])], dim=1)
        weights = anderson_weights(gram, used, solver.ridge).to(z.dtype)
        new = combine(values, weights)
        if solver.mixing < 1:
            new = new - combine(residuals, (1 - solver.mixing) * weights)
        return new, values, residuals, gram, used


def anderson_weights(gram: Tensor, used: Tensor, ridge):
    """The weights of :class:`AndersonSolver`, by elimination.

    Args:
        gram (Tensor): (N, m, m), inner products of the residuals.
        used (Tensor): (N, m), 0 for entries of the history that are not filled yet
            and 1 for others.
        ridge (float): Of the solver.

    Returns:
        Tensor: (N, m), of sum 1; 0 where nothing is.
    """
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    # The root of zero, in entries that are not filled, has no derivative.
    norms = (gram * eye).sum(2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    inverse = 1 / norms.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = gram * inverse[:, :, None] * inverse[:, None, :] + ridge * eye
    target = used * inverse
    target = target / target.amax(1, keepdim=True)
    weights = solve_positive(scaled, target) * target
    return weights / weights.sum(1, keepdim=True)


def solve_positive(matrix: Tensor, right: Tensor):
    """Solve small positive definite systems by Gauss-Jordan elimination.

    Positive definite ones need no pivoting, and so nothing depends on the numbers.

    Args:
        matrix (Tensor): (N, m, m).
        right (Tensor): (N, m).

    Returns:
        Tensor: (N, m).
    """
    size = matrix.shape[1]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    both = torch.cat([matrix, right[:, :, None]], dim=2)
    for k in range(size):
        row = both[:, k : k + 1] / both[:, k : k + 1, k : k + 1]
        # In row k itself this leaves the row that was divided.
        both = both - (both[:, :, k : k + 1] - eye[:, k : k + 1]) * row
    return both[:, :, size]
