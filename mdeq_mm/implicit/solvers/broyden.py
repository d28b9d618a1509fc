"""Broyden's method."""

from types import SimpleNamespace

import torch

from ..checks import check_int
from .base import Solver
from .rows import combine_into, compact, project


class BroydenSolver(Solver):
    """Broyden's good method on g(z) = f(z) - z (Broyden 1965).

    It starts from the inverse Jacobian -I and takes full steps. With steps s_j
    and the residuals g_{j+1} they lead to, the Jacobian is::

        B = -I + G diag(1 / |s_j|^2) S'

    (one column a step), whose inverse follows from the Woodbury identity. Only S
    and G are kept, and a matrix as small as their number.

    Args:
        memory (int, optional): Most updates stored; the method restarts from -I
            when they are used up. (Overwriting the oldest pair instead diverges,
            because later pairs were made with it.) Default: all of them.
        **kwargs: Arguments of :class:`Solver`.
    """

    def __init__(
        self,
        max_steps=30,
        tol=1e-3,
        norm='rel',
        memory=None,
        drop_finished=None,
        check_every=1,
    ):
        super().__init__(max_steps, tol, norm, drop_finished, check_every)
        if memory is not None:
            check_int('memory', memory, 1)
        self.memory = memory

    def init(self, z):
        n, dim = z.shape
        # The last evaluation is followed by no step, the first by no update.
        m = max(self.max_steps - 2, 0)
        if self.memory is not None:
            m = min(m, self.memory)
        return SimpleNamespace(
            stored=0,
            # Whether the last step waits for the residual that it led to.
            pending=False,
            steps=z.new_empty(n, m, dim),
            residuals=z.new_empty(n, m, dim),
            # diag(|s|^2) - S'G
            small=z.new_zeros(n, m, m, dtype=torch.float64),
        )

    def take(self, state, index):
        return SimpleNamespace(
            stored=state.stored,
            pending=state.pending,
            steps=compact(state.steps, index),
            residuals=compact(state.residuals, index),
            small=state.small[index],
        )

    def history(self, state):
        """What the estimate of the inverse is made of, -B^-1 = I + G M^-1 S'.

        Args:
            state: After a solve.

        Returns:
            tuple[Tensor, Tensor, Tensor]: S and G, (N, k, D), and M, (N, k, k), of
            the pairs since the last restart.
        """
        k = state.stored
        return state.steps[:, :k], state.residuals[:, :k], state.small[:, :k, :k]

    def step(self, state, z, fz):
        if state.pending:
            torch.sub(fz, z, out=state.residuals[:, state.stored])
            state.stored += 1
        else:
            state.stored = 0
        state.pending = state.stored < state.steps.shape[1]
        # The step is made where it will be stored.
        new = state.steps[:, state.stored] if state.pending else torch.empty_like(z)
        if state.stored:
            self._direction(state, new)
        else:
            torch.sub(fz, z, out=new)
        return z + new if state.pending else new.add_(z)

    def _direction(self, state, out):
        """-B^-1 g with the pairs stored, g being the newest residual."""
        k = state.stored
        steps, residuals = state.steps[:, :k], state.residuals[:, :k]
        g, last = residuals[:, -1], steps[:, -1]
        column = project(steps, g).double()
        row = project(residuals, last).double()
        state.small[:, :k, k - 1] = -column
        state.small[:, k - 1, :k] = -row
        # By the same kind of product, so that both round alike: where they are equal
        # the Jacobian is singular, and a tiny difference would be a huge step.
        state.small[:, k - 1, k - 1] += project(steps[:, -1:], last)[:, 0].double()
        small = state.small[:, :k, :k]
        weights = torch.linalg.solve_ex(small, column[:, :, None])[0].squeeze(2)
        # A singular system, or the rows of a sample that is done: a plain step.
        usable = weights.isfinite().all(1, keepdim=True)
        weights = torch.where(usable, weights, torch.zeros_like(weights))
        combine_into(out, g, residuals, weights.to(g.dtype))
