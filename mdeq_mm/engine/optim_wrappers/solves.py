"""What a training step leaves to be judged: how its solves ended, and its buffers."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...implicit import PhantomGradient, Status
from ...implicit.layer import equilibrium_layers


@dataclass
class Outcome:
    """How a solve ended, one entry a sample; not where, which takes memory.

    Attributes:
        kind (str): ``'forward'`` or ``'adjoint'``.
        status (Tensor): (N,).
        residual (Tensor): (N,), as the solver measures it.
        steps (Tensor): (N,).
        relative (Tensor | None): (N,), what a limit is compared with; None where
            no equation was to be solved.
    """

    kind: str
    status: Tensor
    residual: Tensor
    steps: Tensor
    relative: Tensor | None

    def failed(self, limit):
        """Samples that diverged, or whose residual is above the limit, (N,) bool."""
        failed = self.status == Status.DIVERGED
        if limit is not None and self.relative is not None:
            failed = failed | ~(self.relative <= limit)
        return failed


class Solve:
    """A solve of the forward pass that a layer has just made.

    Args:
        layer (EquilibriumLayer): The layer.
    """

    def __init__(self, layer):
        self.solution = layer.last_solution
        # Unrolled, f is applied a few times: no equation is solved either way. A
        # phantom gradient has no more terms than it was told, by intention.
        self._solves = layer.unroll_steps is None
        self._solves_adjoint = self._solves and not isinstance(
            layer.gradient, PhantomGradient
        )
        own = layer.training and layer.gradient.iterates
        solver = layer.solver if layer.training else layer.eval_solver
        self._absolute = self._solves and not own and solver.norm == 'abs'

    def outcomes(self):
        """Of the forward solve, and of the backward one if there was one.

        Returns:
            list[Outcome]: One or two.
        """
        solution = self.solution
        relative = solution.residual
        if self._absolute:
            # ||z|| in place of ||f(z)||: they differ by the residual at most.
            size = torch.linalg.vector_norm(solution.value, dim=1)
            share = relative / torch.maximum(size, relative)
            # Neither 0 / 0 nor inf / inf is a share.
            known = relative.isfinite() & (relative > 0)
            relative = torch.where(known, share, relative)
        found = [self._outcome('forward', solution, relative if self._solves else None)]
        if solution.adjoint is not None:
            relative = solution.adjoint.residual if self._solves_adjoint else None
            found.append(self._outcome('adjoint', solution.adjoint, relative))
        return found

    @staticmethod
    def _outcome(kind, solution, relative):
        return Outcome(
            kind, solution.status, solution.residual, solution.steps, relative
        )


@contextmanager
def recorded_solves(model):
    """Collect all solves of a model meanwhile.

    Args:
        model (nn.Module): The model, wrapped or not.

    Yields:
        list[Solve]: In their order.
    """
    layers = equilibrium_layers(model)
    before = [layer.last_solution for layer in layers]
    found = []
    handles = [
        layer.register_forward_hook(lambda layer, *_: found.append(Solve(layer)))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    # A compiled model may not call hooks that came after its compilation.
    seen = {id(solve.solution) for solve in found}
    for layer, old in zip(layers, before, strict=True):
        if layer.last_solution is not old and id(layer.last_solution) not in seen:
            found.append(Solve(layer))


class Buffers:
    """The buffers of a model as they are now, to go back to.

    A forward pass changes the statistics of normalisation layers, and one
    non-finite image spoils them for good, whatever becomes of the step.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model):
        self._pairs = [(b, b.detach().clone()) for b in model.buffers()]

    @torch.no_grad()
    def restore(self):
        for buffer, kept in self._pairs:
            buffer.copy_(kept)

    def spoiled(self, device):
        """Whether any became non-finite, a bool scalar."""
        pairs = [pair for pair in self._pairs if pair[0].is_floating_point()]
        now, kept = zip(*pairs, strict=True) if pairs else ((), ())
        # A constant such as a mask may hold infinities by intention.
        return (finite(kept, device) & ~finite(now, device)).any()


@torch.no_grad()
def finite(tensors, device):
    """Which tensors are finite, on a device, without waiting for it.

    One pass over the numbers. Those whose squares overflow count as not finite
    too: the second moments of optimisers and the norm that clips would.

    Args:
        tensors (Sequence[Tensor]): Floating.
        device (torch.device): Of the result.

    Returns:
        Tensor: Bool, an entry for each.
    """
    tensors = [t._values() if t.is_sparse else t for t in tensors]
    # A norm above 65504 is none of float16.
    tensors = [t.float() if t.dtype == torch.float16 else t for t in tensors]
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return torch.ones(1, dtype=torch.bool, device=device)
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.to(device, torch.float32) for norm in norms]).isfinite()
