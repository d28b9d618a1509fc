"""torchdeq in the place of an EquilibriumLayer, driving the same f."""

from types import SimpleNamespace

import torch
from torch import nn

from mdeq_mm.implicit import StateSpec


class TorchDEQLayer(nn.Module):
    """An equilibrium found and differentiated by torchdeq.

    Args:
        layer (EquilibriumLayer): The layer to replace, whose f and weights serve.
        eval_tol (float): Tolerance in evaluation.
        solver_kwargs (dict, optional): Further arguments of its forward solver.
        **options: Arguments of ``torchdeq.get_deq``.

    Attributes:
        last_solution (SimpleNamespace | None): ``residual``, (N,), relative.
    """

    def __init__(self, layer, eval_tol, solver_kwargs=None, **options):
        super().__init__()
        # Imported here: it is a requirement of this comparison alone.
        from torchdeq import get_deq

        self.layer = layer
        self.eval_tol, self.solver_kwargs = eval_tol, solver_kwargs
        self.deq = get_deq(**options)
        self.train_tol = self.deq.f_tol
        self.last_solution = None

    def forward(self, start, *inputs):
        """As of :class:`EquilibriumLayer`."""
        spec = StateSpec.of(start)
        equation = self.layer.equation(start, *inputs)
        z = spec.pack(start)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        self.deq.f_tol = self.train_tol if self.training else self.eval_tol
        (*_, out), info = self.deq(equation, z, self.solver_kwargs)
        self.last_solution = SimpleNamespace(residual=info['rel_lowest'].detach())
        return spec.unpack(out)
