"""What a solve returns."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Status(IntEnum):
    """How the solve of one sample ended.

    Failure is a value here, not an exception: a training step with a few
    unconverged samples is normal, and the caller decides what to make of it.
    """

    CONVERGED = 0
    STALLED = 1
    MAX_STEPS = 2
    DIVERGED = 3

    @property
    def advice(self):
        """str: One sentence on what to do about samples that ended so."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: 'The residual is below the tolerance.',
    Status.STALLED: (
        'The residual is at the floor of the precision that f runs in, above the '
        'tolerance: raise tol, or run f in a wider type.'
    ),
    Status.MAX_STEPS: (
        'The limit of evaluations was reached first: raise max_steps or tol, or '
        'make f more contractive with Jacobian regularisation.'
    ),
    Status.DIVERGED: (
        'The values of f are not finite: check inputs and '
        'weights, train longer unrolled, or regularise the Jacobian.'
    ),
}


@dataclass
class Solution:
    """Result of a solve, one entry a sample. All tensors are detached.

    Attributes:
        value (Tensor): (N, D), the best iterate of each sample; always finite.
        residual (Tensor): (N,), the residual at ``value``, relative or absolute
            as the solver was told; infinite where f never returned a finite value.
        steps (Tensor): (N,) int64, evaluations of f spent on each sample.
        status (Tensor): (N,) int64, values of :class:`Status`.
        trace (Tensor, optional): (steps, N), the residual of each evaluation,
            NaN after a sample stopped. Only where it was asked for.
        adjoint (Solution, optional): The solve of the backward pass, filled in
            by it.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    status: Tensor
    trace: Tensor | None = None
    adjoint: 'Solution | None' = None

    @property
    def converged(self):
        """Tensor: (N,) bool."""
        return self.status == Status.CONVERGED

    def shares(self):
        """Share of the samples that ended with each status.

        Returns:
            dict[str, float]: Status name in lower case to share in [0, 1].
        """
        counts = torch.bincount(self.status.cpu(), minlength=len(Status))
        return {s.name.lower(): counts[s].item() / len(self.status) for s in Status}

    def __str__(self):
        shares = ', '.join(f'{v:.0%} {k}' for k, v in self.shares().items() if v)
        worst = Status(int(self.status.max()))
        return (
            f'{len(self.status)} sample(s): {shares}; '
            f'{self.steps.float().mean():.1f} evaluations on average; '
            f'median residual {self.residual.median():.1e}. {worst.advice}'
        )
