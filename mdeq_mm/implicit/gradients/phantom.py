"""The phantom gradient."""

import torch

from ..checks import check_flag, check_int, check_share
from ..solution import Solution, Status
from .base import Gradient, equilibrium, infinite, iterate, unit


class PhantomGradient(Gradient):
    """An inexact gradient from a few terms of the Neumann series (Geng et al. 2021).

    With damping d and k steps the adjoint is d * sum_{i<k} (d J' + (1 - d) I)^i g,
    which approaches the exact one as k grows where f is contractive. k = 1 with
    d = 1 is the Jacobian-free gradient (Fung et al. 2022).

    Args:
        steps (int): k, number of terms.
        damping (float): d in (0, 1]; 1 is undamped. Damping shrinks the norm of
            the gradient when steps are few.
        unroll (bool): Whether to apply f k times to z* with gradients instead of
            using the series through one recorded f. At the equilibrium both are
            the same gradient; the series keeps one evaluation in memory, the
            unrolled form k. Unrolled, the output is the last of these iterates.
    """

    def __init__(self, steps=5, damping=1.0, unroll=False):
        check_int('steps', steps, 1)
        check_share('damping', damping)
        check_flag('unroll', unroll)
        self.steps = int(steps)
        self.damping = float(damping)
        self.unroll = unroll

    def __call__(self, equation, start, solver, trace=False):
        solution = solver.solve(equation, start, trace=trace)
        if not self.unroll:
            return equilibrium(equation, solution, self._adjoint), solution
        out, _, healthy = iterate(equation, solution.value, self.steps, self.damping)
        solution.status = torch.where(healthy, solution.status, int(Status.DIVERGED))
        return out, solution

    def _adjoint(self, product, grad):
        # Scaled like the exact adjoint's, so that f in half precision does not
        # overflow under a scaled loss.
        direction, norm = unit(grad)
        term, total = direction, direction
        for _ in range(self.steps - 1):
            term = term.lerp(product(term), self.damping)
            total = total + term
        size = torch.linalg.vector_norm(total, dim=1)
        tiny = torch.finfo(size.dtype).tiny
        # The last term is what the sum before it missed of the adjoint equation.
        residual = torch.linalg.vector_norm(term, dim=1) / size.clamp_min(tiny)
        finite = total.isfinite().all(1)
        steps = torch.full_like(finite, self.steps - 1, dtype=torch.int64)
        status = torch.full_like(steps, Status.MAX_STEPS)
        solution = Solution(
            value=torch.where(finite[:, None], total, torch.zeros_like(total)),
            residual=torch.where(finite, residual, infinite(len(finite), residual)),
            steps=steps,
            status=torch.where(finite, status, int(Status.DIVERGED)),
        )
        return solution.value * (self.damping * norm), solution
