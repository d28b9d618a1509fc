"""The reversible gradient."""

import math

import torch

from ..checks import check_int, check_share
from ..solution import Solution, Status
from ..solvers.base import residual_of
from .base import Gradient, infinite, no_second_derivative
from .linearise import Linearisation, evaluate, finite_samples

#: Digits that reconstructing the states may lose; float64 has 16.
MOST_DIGITS = 9.0


class ReversibleGradient(Gradient):
    """The exact gradient of a reversible iteration, at constant memory.

    Two states take turns (McCallum, Rowlands, Webster and Foster, reversible deep
    equilibrium models, 2025):

        y <- (1 - beta) y + beta f(z)
        z <- (1 - beta) z + beta f(y)

    The backward pass runs the iteration in reverse, so that it needs the last
    states alone. Going back multiplies errors by 1 / (1 - beta) a step: the states
    are kept in double precision whatever f computes in, and the start is stored
    rather than reconstructed, because f is singular at zero.

    Unlike the implicit gradient it is the gradient of what the forward pass
    computed, converged or not. A step takes two evaluations of f, and two full
    products in the backward pass.

    Args:
        steps (int): Number of steps, of two evaluations each.
        beta (float): Relaxation, in (0, 1).

    Raises:
        ValueError: If ``steps * log10(1 / (1 - beta))`` exceeds 9, the digits that
            may be lost on the way back.
    """

    iterates = True

    def __init__(self, steps=4, beta=0.8):
        check_int('steps', steps, 1)
        check_share('beta', beta)
        if beta == 1:
            raise ValueError('beta=1.0 cannot be reversed: use 0 < beta < 1')
        digits = steps * math.log10(1 / (1 - beta))
        if digits > MOST_DIGITS:
            most = int(MOST_DIGITS / math.log10(1 / (1 - beta)))
            raise ValueError(
                f'steps={steps} with beta={beta} lose {digits:.1f} digits on the way '
                f'back, more than {MOST_DIGITS:.0f}: use at most {most} steps, or a '
                'smaller beta'
            )
        self.steps = int(steps)
        self.beta = float(beta)

    def __call__(self, equation, start, solver=None, trace=False):
        with torch.no_grad():
            finite = start.isfinite().all(1, keepdim=True)
            start = torch.where(finite, start, torch.zeros_like(start))
        everyone = torch.ones(len(start), dtype=torch.bool, device=start.device)
        first, strays = evaluate(equation, start.double(), everyone)
        # What the last evaluation of f was made of, for the residual.
        seen = {}
        out = _Reversible.apply(equation, start, first, self.steps, self.beta, seen,
                                *equation.tensors, *strays)  # fmt: skip
        healthy, last, fz = seen['healthy'], seen['last'], seen['fz']
        residual = residual_of(last, fz)
        residual = torch.where(healthy, residual, infinite(len(residual), residual))
        steps = torch.full_like(healthy, 2 * self.steps, dtype=torch.int64)
        status = torch.where(healthy, int(Status.MAX_STEPS), int(Status.DIVERGED))
        value = torch.where(healthy[:, None], last.to(start.dtype), start)
        return out, Solution(value, residual, steps, status.to(torch.int64))


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, equation, start, first, steps, beta, seen, *tensors):
        y = z = start.double()
        for step in range(steps):
            y = y.lerp(equation(z) if step else first, beta)
            fz = equation(y)
            z = z.lerp(fz, beta)
        healthy = equation.healthy(y.isfinite().all(1) & z.isfinite().all(1))
        seen.update(healthy=healthy, last=y, fz=fz)
        ctx.equation, ctx.steps, ctx.beta = equation.bind(()), steps, beta
        ctx.save_for_backward(start, y, z, healthy, *tensors)
        return torch.where(healthy[:, None], z.to(start.dtype), start)

    @staticmethod
    @no_second_derivative
    def backward(ctx, grad):
        start, y, z, healthy, *tensors = ctx.saved_tensors
        steps, beta = ctx.steps, ctx.beta
        count = len(ctx.equation.per_sample)
        equation, strays = ctx.equation.bind(tensors[:count]), tensors[count:]
        usable = healthy & grad.isfinite().all(1)
        grad_z = torch.where(usable[:, None], grad, torch.zeros_like(grad)).double()
        grad_y = torch.zeros_like(grad_z)
        total = [None] * len(tensors)

        def back(partner, point, upstream):
            """Undo one half step, in which f at ``point`` was mixed into a state."""
            linear = Linearisation(equation, point, equation.tensors, usable, strays)
            product, grads = linear.all_products(beta * upstream)
            for i, grad in enumerate(grads):
                if grad is not None:
                    total[i] = grad if total[i] is None else total[i].add_(grad)
            return (partner - beta * linear.value) / (1 - beta), finite_samples(product)

        for step in reversed(range(steps)):
            before, product = back(z, y, grad_z)
            # The first state is the start itself.
            z = before if step else start.double()
            grad_z, grad_y = (1 - beta) * grad_z, grad_y + product
            y, product = back(y, z, grad_y)
            grad_z, grad_y = grad_z + product, (1 - beta) * grad_y
        return None, None, None, None, None, None, *total
