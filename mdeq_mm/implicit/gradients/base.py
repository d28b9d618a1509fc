"""The interface of gradients, and the one autograd function they share."""

import functools
import math

import torch
from torch import Tensor

from ..build import build
from ..solution import Solution
from ..transforms import transforming
from .linearise import Linearisation, evaluate, finite_samples, replace_failed


def build_gradient(cfg, field='gradient'):
    """Build a gradient from ``dict(type=..., ...)``; see :func:`build`."""
    return build('gradient', cfg, field)


class Gradient:
    """Base of all gradients: how gradients pass through an equilibrium.

    A gradient owns the forward pass too, because some take any solver and some
    iterate by themselves.
    """

    #: Whether the forward iteration is the gradient's own. The solver that is
    #: configured beside it then serves the evaluation alone.
    iterates = False

    def check(self, solver):
        """Refuse a solver that the gradient cannot work with.

        Args:
            solver (Solver): The solver of the forward pass.

        Raises:
            ValueError: With what to use instead.
        """

    def forget(self):
        """Drop what was kept of earlier solves to start later ones from."""

    def __call__(self, equation, start: Tensor, solver, trace=False):
        """Solve, and return f(z*) with gradients.

        Args:
            equation (Equation): f with everything fixed.
            start (Tensor): (N, D), the first iterate.
            solver (Solver): Solver of the forward pass.
            trace (bool): Whether the solution holds the residual of each step.

        Returns:
            tuple[Tensor, Solution]: f(z*), (N, D), differentiable with respect
            to the equation's tensors, and the solution z*.
        """
        raise NotImplementedError


def no_second_derivative(backward):
    """Make a backward pass that is not recorded an error where it would have to be.

    PyTorch's ``once_differentiable`` tells only where the incoming gradient is
    itself differentiated, which it is not where a loss is linear in the output.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() or transforming(grads):
            raise RuntimeError(
                'the backward pass of an equilibrium is not recorded, so that it has '
                'no second derivatives (create_graph=True) and cannot be vectorised '
                "(is_grads_batched=True): train with gradient=dict(type='Unrolled"
                "Gradient'), or set unroll_steps of the equilibrium layer"
            )
        return backward(ctx, *grads)

    return checked


class _Equilibrium(torch.autograd.Function):
    """f(z*), with a backward pass that solves for the adjoint first.

    The tensors of the equation, and strays behind them, are inputs of the function:
    their gradients are returned, never accumulated by a ``backward()`` inside, which
    distributed wrappers forbid.
    """

    @staticmethod
    def forward(
        ctx, equation, solution, adjoint, healthy, out, linear, history, *tensors
    ):
        z = solution.value
        ctx.solution, ctx.adjoint, ctx.linear = solution, adjoint, linear
        # The equation is kept without its tensors: they are saved where autograd
        # sees them.
        ctx.equation = equation.bind(())
        ctx.save_for_backward(z, healthy, *history, *tensors)
        ctx.history = len(history)
        # f(z*) may overflow though f was finite at z* in the solve; the head
        # gets finite features in any case.
        usable = healthy & out.isfinite().all(1)
        return torch.where(usable[:, None], out, z)

    @staticmethod
    @no_second_derivative
    def backward(ctx, grad):
        z, healthy, *tensors = ctx.saved_tensors
        history, tensors = tensors[: ctx.history], tensors[ctx.history :]
        count = len(ctx.equation.per_sample)
        equation, strays = ctx.equation.bind(tensors[:count]), tensors[count:]
        linear, ctx.linear = ctx.linear, None
        if linear is None:
            linear = Linearisation(equation, z, equation.tensors, healthy, strays)
        usable = healthy & grad.isfinite().all(1)
        grad = torch.where(usable[:, None], grad, torch.zeros_like(grad)).to(z.dtype)
        y, solution = ctx.adjoint(linear.product, grad, *history)
        ctx.solution.adjoint = solution
        failed = ~(solution.residual.isfinite() & y.isfinite().all(1))
        if failed.any():
            # A derivative of f is not finite there: 0 * NaN would reach the
            # shared weights, so f is recorded again without these samples.
            usable &= ~failed
            grads = _product_of(usable, equation, z, strays, y)
        else:
            grads = linear.full_product(y)
        if not equation.half and not _shared_are_finite(equation, grads):
            # In float16 that is an overflow, which a loss scaler has to see.
            usable &= _sound_samples(equation, z, strays, y)
            grads = _product_of(usable, equation, z, strays, y)
        return None, None, None, None, None, None, None, *grads


def _product_of(usable, equation, z, strays, y):
    """The full product of f recorded again, with the usable samples (N,) alone."""
    if not usable.any():
        return [torch.zeros_like(t) for t in (*equation.tensors, *strays)]
    y = torch.where(usable[:, None], y, torch.zeros_like(y))
    linear = Linearisation(equation, z, equation.tensors, usable, strays)
    return linear.full_product(y)


def _shared_are_finite(equation, grads):
    """Whether the gradients of all tensors that samples share are finite."""
    mine = equation.per_sample
    mine = (*mine, *[False] * (len(grads) - len(mine)))
    shared = [
        g.sum() for g, m in zip(grads, mine, strict=True) if g is not None and not m
    ]
    return not shared or bool(torch.stack(shared).isfinite().all())


def _sound_samples(equation, z, strays, y):
    """Samples whose own product with the shared tensors' Jacobian is finite, (N,).

    Args:
        equation (Equation): f.
        z (Tensor): (N, D).
        strays (Sequence[Tensor]): What else f is differentiated by.
        y (Tensor): (N, D), the adjoint.
    """
    sound = []
    for i in range(len(z)):
        row = slice(i, i + 1)
        one = equation.take(row)
        healthy = z.new_ones(1).bool()
        linear = Linearisation(one, z[row], one.tensors, healthy, strays)
        sound.append(_shared_are_finite(one, linear.full_product(y[row])))
    return torch.tensor(sound, device=z.device)


class _Tell(torch.autograd.Function):
    """The identity, whose backward pass tells a weight of overflow behind it."""

    @staticmethod
    def forward(ctx, out, healthy, weight):
        ctx.save_for_backward(healthy)
        ctx.like = weight.shape, weight.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        (healthy,) = ctx.saved_tensors
        shape, dtype = ctx.like
        overflow = (healthy & ~grad.isfinite().all(1)).any()
        mark = torch.zeros(shape, dtype=dtype, device=grad.device)
        return grad, None, mark.masked_fill_(overflow, math.inf)


def tell_overflow(equation, out: Tensor, residual: Tensor):
    """f(z*) as it is, for equations in float16.

    A sample whose incoming gradient is not finite contributes nothing to the
    gradients of f. In float16 that is an overflow of what follows, which a loss scaler
    would not see: it has to find a weight whose gradient is not finite either.

    Args:
        equation (Equation): f.
        out (Tensor): (N, D), f(z*).
        residual (Tensor): (N,), of z*; samples that failed tell nothing.
    """
    shared = [
        t
        for t, mine in zip(equation.tensors, equation.per_sample, strict=True)
        if t.requires_grad and not mine
    ]
    if not (equation.half and shared and out.requires_grad):
        return out
    return _Tell.apply(out, residual.isfinite(), min(shared, key=Tensor.numel))


def equilibrium(equation, solution: Solution, adjoint, history=()):
    """f(z*), differentiable with respect to the equation's tensors.

    Args:
        equation (Equation): f.
        solution (Solution): z*. Its ``adjoint`` is set by the backward pass.
        adjoint (Callable): ``adjoint(product, grad) -> (y, Solution)`` computes
            the adjoint from products with J' and the incoming gradient, (N, D).
        history (Sequence[Tensor]): What else ``adjoint`` is given, saved for the
            backward pass.

    Returns:
        Tensor: (N, D). Samples whose solve gave nothing finite keep z* and
        contribute nothing to any gradient.
    """
    z, linear = solution.value, None
    healthy = equation.healthy(solution.residual.isfinite())
    if equation.recompute or not torch.is_grad_enabled():
        out, strays = evaluate(equation, z, healthy)
    else:
        linear = Linearisation(equation, z, equation.tensors, healthy)
        out, strays = linear.value, linear.strays
        # Not to be kept: the backward pass needs the recorded graph alone.
        linear.value = None
    return _Equilibrium.apply(
        equation, solution, adjoint, healthy, out, linear, tuple(history),
        *equation.tensors, *strays,
    )  # fmt: skip


def iterate(equation, z: Tensor, steps, damping=1.0):
    """Apply f a number of times, recorded for autograd.

    Args:
        equation (Equation): f.
        z (Tensor): (N, D), where to start.
        steps (int): Number of applications.
        damping (float): z <- (1 - damping) z + damping f(z).

    Returns:
        tuple[Tensor, Tensor, Tensor]: The last iterate, the one before it
        (detached), and which samples stayed finite, (N,) bool. The others are
        replaced by their start, without gradient.
    """
    everyone = torch.ones(len(z), dtype=torch.bool, device=z.device)
    healthy = equation.healthy(everyone)
    z = torch.where(z.isfinite().all(1, keepdim=True), z, torch.zeros_like(z))
    while healthy.any():
        inside, last = replace_failed(_guarded(equation), z, healthy)
        new = last
        for _ in range(steps):
            last, new = new, _apply(inside, new)
            if damping != 1:
                new = last.lerp(new, damping)
            if new.requires_grad:
                new.register_hook(finite_samples)
        finite = new.detach().isfinite().all(1)
        if (finite | ~healthy).all():
            out = torch.where(healthy[:, None], new, z)
            return out, torch.where(healthy[:, None], last.detach(), z), healthy
        # Once more without the samples that failed on the way, since they would
        # poison the gradients of the shared weights.
        healthy = healthy & finite
    # Nothing is left: the start, with gradients of zero.
    link = sum(t.sum() for t in equation.tensors if t.requires_grad)
    return torch.where(healthy[:, None], link, z), z, healthy


def _guarded(equation):
    """The same equation; its inputs get gradients without non-finite samples."""
    if not torch.is_grad_enabled():
        return equation

    def guard(tensor):
        if tensor.requires_grad:
            tensor = tensor.view_as(tensor)
            tensor.register_hook(finite_samples)
        return tensor

    return equation.map_samples(guard)


def _apply(equation, z):
    if not (equation.recompute and torch.is_grad_enabled()):
        return equation(z)
    return torch.utils.checkpoint.checkpoint(
        lambda z, *tensors: equation(z, tensors),
        z,
        *equation.tensors,
        use_reentrant=False,
        # f draws no random numbers, so there is no state to restore.
        preserve_rng_state=False,
    )


def unit(grad: Tensor):
    """Scale each sample to unit norm, without overflow on the way.

    Args:
        grad (Tensor): (N, D).

    Returns:
        tuple[Tensor, Tensor]: The scaled samples and their norms (N, 1); zero
        stays zero.
    """
    largest = grad.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = grad / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    return scaled / safe, norm * largest


def infinite(n, like):
    """Residuals (n,) of samples that gave nothing finite."""
    return like.new_full((n,), math.inf)
