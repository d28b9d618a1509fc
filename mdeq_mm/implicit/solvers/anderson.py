"""Anderson acceleration."""

from types import SimpleNamespace

import torch

from ..checks import check_int, check_share
from .base import Solver
from .rows import combine, compact, project


class AndersonSolver(Solver):
    """Anderson acceleration (Anderson 1965; Walker and Ni 2011).

    The next iterate is the combination of the last ``memory`` ones, with weights
    that sum to one and minimise the norm of the combined residual. The least
    squares problem is solved over residuals scaled to unit norm, with a ridge
    on the weights of the scaled ones: its matrix is positive definite whatever
    the residuals are, parallel and zero ones included.

    Args:
        memory (int): Number of past iterates combined, at least 1.
        ridge (float): Regularisation, relative to the scaled residuals; > 0.
        mixing (float): In (0, 1]; share of f in the next iterate, the rest is
            the combined iterate itself.
        **kwargs: Arguments of :class:`Solver`.
    """

    def __init__(
        self,
        max_steps=30,
        tol=1e-3,
        norm='rel',
        memory=5,
        ridge=1e-6,
        mixing=1.0,
        drop_finished=None,
        check_every=1,
    ):
        super().__init__(max_steps, tol, norm, drop_finished, check_every)
        check_int('memory', memory, 1)
        check_share('mixing', mixing)
        check_share('ridge', ridge)
        self.memory = int(memory)
        self.ridge = float(ridge)
        self.mixing = float(mixing)

    def init(self, z):
        n, dim = z.shape
        m = min(self.memory, self.max_steps)
        return SimpleNamespace(
            count=0,
            values=z.new_empty(n, m, dim),
            residuals=z.new_empty(n, m, dim),
            gram=z.new_zeros(n, m, m, dtype=torch.float64),
        )

    def take(self, state, index):
        return SimpleNamespace(
            count=state.count,
            values=compact(state.values, index),
            residuals=compact(state.residuals, index),
            gram=state.gram[index],
        )

    def step(self, state, z, fz):
        slot = state.count % state.values.shape[1]
        state.count += 1
        used = min(state.count, state.values.shape[1])
        state.values[:, slot] = fz
        torch.sub(fz, z, out=state.residuals[:, slot])
        values, residuals = state.values[:, :used], state.residuals[:, :used]

        row = project(residuals, residuals[:, slot]).double()
        state.gram[:, slot, :used] = row
        state.gram[:, :used, slot] = row
        weights = self._weights(state.gram[:, :used, :used]).to(z.dtype)
        new = combine(values, weights)
        if self.mixing < 1:
            new -= combine(residuals, (1 - self.mixing) * weights)
        return new

    def _weights(self, gram):
        """Minimise w' gram w + ridge with sum(w) = 1, each sample by itself."""
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        norms = norms.clamp_min(torch.finfo(torch.float32).tiny)
        scaled = gram / (norms[:, :, None] * norms[:, None, :])
        scaled.diagonal(dim1=1, dim2=2).add_(self.ridge)
        target = 1 / norms
        # Dividing by the largest entry keeps tiny residuals from overflowing.
        target = target / target.amax(1, keepdim=True)
        # solve_ex does not check for success, which would synchronise with a GPU.
        solved = torch.linalg.solve_ex(scaled, target[:, :, None])[0].squeeze(2)
        weights = solved * target
        return weights / weights.sum(1, keepdim=True)
