"""Differentiation through the iteration itself."""

import torch

from ..checks import check_int, check_share
from ..solution import Solution, Status
from ..solvers.base import residual_of
from .base import Gradient, infinite, iterate


class UnrolledGradient(Gradient):
    """Apply f a fixed number of times and differentiate through all of them.

    The exact gradient of a weight-tied network of that depth. It needs no
    equilibrium, which makes it the way to start a training: a random f is not
    contractive. Memory grows with the number of steps, unless f is recomputed.

    Samples that fail on the way, or whose gradient is not finite, contribute
    nothing. One exception: a derivative of f in the shared weights that is not
    finite, though f is, reaches them; :class:`ImplicitGradient` contains it too.

    Args:
        steps (int): Number of applications of f.
        damping (float): z <- (1 - damping) z + damping f(z), in (0, 1].
    """

    iterates = True

    def __init__(self, steps=5, damping=1.0):
        check_int('steps', steps, 1)
        check_share('damping', damping)
        self.steps = int(steps)
        self.damping = float(damping)

    def __call__(self, equation, start, solver=None, trace=False):
        out, last, healthy = iterate(equation, start, self.steps, self.damping)
        with torch.no_grad():
            # Undamped, the output is f(last), so the residual costs nothing.
            fz = out.detach()
            if self.damping != 1:
                fz = last + (fz - last) / self.damping
            residual = residual_of(last, fz)
            residual = torch.where(healthy, residual, infinite(len(last), residual))
            steps = torch.full_like(healthy, self.steps, dtype=torch.int64)
            status = torch.where(
                healthy, int(Status.MAX_STEPS), int(Status.DIVERGED)
            ).to(torch.int64)
        return out, Solution(value=last, residual=residual, steps=steps, status=status)
