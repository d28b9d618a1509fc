"""The equilibrium as a layer: equation, solver and gradient put together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .equation import Equation
from .functional import FunctionalModule
from .gradients import ImplicitGradient, UnrolledGradient, build_gradient
from .gradients.base import replace_failed, tell_overflow
from .jacobian import hutchinson
from .pending import Pending
from .solvers import build_solver
from .state import StateSpec, has_channels_last


def equilibrium_layers(model):
    """All equilibrium layers in a model, wrapped for distributed training or not.

    Args:
        model (nn.Module): The model.

    Returns:
        list[EquilibriumLayer]: In the order of the model's modules.
    """
    return [m for m in model.modules() if isinstance(m, EquilibriumLayer)]


class EquilibriumLayer(nn.Module):
    """Layer whose output is the equilibrium z* = f(z*, inputs).

    In training the output is f(z*) with gradients, in evaluation z* itself. Where f
    gave nothing finite for a sample, its output is its start in training, so that it
    harms no other sample, and NaN in evaluation.

    Args:
        f (nn.Module): Called as ``f(maps, *inputs) -> maps`` with lists of maps
            (N, ...) of unchanged shapes. It must be pure (see
            :class:`FunctionalModule`) and treat samples one by one.
        solver (dict | Solver): Solver of the forward pass.
        gradient (dict | Gradient): How gradients pass through.
        eval_solver (dict | Solver, optional): Solver in evaluation. Default:
            ``solver``.
        recompute (bool): Whether f is evaluated again in the backward pass
            instead of keeping its intermediate results.

    Attributes:
        last_solution (Solution | None): Of the last forward pass, detached; its
            ``adjoint`` is that of the last backward pass.
        last_spec (StateSpec | None): How the maps lie in its ``value``.
        unroll_steps (int | None): If set, f is applied this many times in place
            of a solve, in training and evaluation, differentiated directly.
        trace (bool): Whether solutions hold the residual of each step.
        observe (Callable | None): If set, called after each evaluation of f in
            solves of the evaluation mode without gradients, as ``observe(rows,
            maps, residual)``: indices of the samples that are still in the batch,
            f at their iterates as maps (n, ...), and the residuals there (n,).
        inspect (Callable | None): If set, called after each solve in training, as
            ``inspect(equation, solution)``, without gradients.
        jacobian_probes (int): Probes of the Jacobian loss (Bai et al. 2021) that each
            forward pass in training computes at its solution; none where 0.
        jacobian_seed (int | None): Of the probes; None takes PyTorch's state.

    Example:
        >>> import torch
        >>> from mdeq_mm.implicit import EquilibriumLayer
        >>> class Halve(torch.nn.Module):
        ...     def forward(self, maps, x):
        ...         return [maps[0] / 2 + x]
        >>> layer = EquilibriumLayer(
        ...     Halve(),
        ...     solver=dict(type='AndersonSolver', max_steps=20, tol=1e-6),
        ...     gradient=dict(type='ImplicitGradient'))
        >>> (z,) = layer([torch.zeros(2, 8, 4, 4)], torch.ones(2, 8, 4, 4))
        >>> round(z.mean().item(), 4)
        2.0
    """

    def __init__(self, f, solver, gradient, eval_solver=None, recompute=False):
        super().__init__()
        self.f = f
        self.solver = build_solver(solver, 'solver')
        self.eval_solver = (
            self.solver
            if eval_solver is None
            else build_solver(eval_solver, 'eval_solver')
        )
        self.gradient = build_gradient(gradient, 'gradient')
        self.gradient.check(self.solver)
        self.recompute = recompute
        self.unroll_steps = None
        self.trace = False
        self.observe = None
        self.inspect = None
        self.last_solution = self.last_spec = None
        self.jacobian_probes = 0
        self.jacobian_seed = None
        self._jacobian_losses = Pending()
        self._function = FunctionalModule(f)

    def extra_repr(self):
        lines = [f'solver={self.solver}', f'gradient={type(self.gradient).__name__}']
        if self.eval_solver is not self.solver:
            lines.insert(1, f'eval_solver={self.eval_solver}')
        return '\n'.join(lines)

    def equation(self, start: Sequence[Tensor], *inputs: Tensor, spec=None):
        """The equation of one forward pass.

        Args:
            start (Sequence[Tensor]): Maps of the shapes of the state.
            *inputs (Tensor): What f is given beside the state, (N, ...).
            spec (StateSpec, optional): How the maps lie in the state. Default: in
                the plain memory format.

        Returns:
            Equation: f with weights and inputs fixed.
        """
        spec = spec or StateSpec.of(start)
        weights = self._function.tensors(self.f)
        count = len(weights)
        autocast = torch.is_autocast_enabled(start[0].device.type)

        def function(z, tensors):
            weights, inputs = tensors[:count], tensors[count:]
            maps = spec.unpack(z)
            if inputs:
                # The state may be wider than what f computes in. Autocast narrows
                # single precision by itself, and leaves double as it is.
                dtype = inputs[0].dtype
                if autocast:
                    dtype = torch.promote_types(dtype, torch.float32)
                maps = [m.to(dtype) for m in maps]
            return spec.pack(self._function(weights, maps, *inputs), z.dtype)

        return Equation(
            function,
            (*weights, *inputs),
            [False] * count + [True] * len(inputs),
            recompute=self.recompute,
        )

    # Tracing the solve takes many minutes, and every number of steps anew. What stands
    # around the layer is compiled, and so is an f that was compiled by itself.
    @torch.compiler.disable
    def forward(self, start: Sequence[Tensor], *inputs: Tensor):
        """Find the equilibrium.

        Args:
            start (Sequence[Tensor]): First iterate, maps (N, ...).
            *inputs (Tensor): What f is given beside the state, (N, ...).

        Returns:
            list[Tensor]: Maps of the shapes of ``start``, float32 or wider.
        """
        spec = StateSpec.of(start, channels_last=has_channels_last(start[0]))
        equation = self.equation(start, *inputs, spec=spec)
        z = spec.pack(start)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.unroll_steps is not None:
            gradient = UnrolledGradient(self.unroll_steps)
            out, solution = gradient(equation, z, None, self.trace)
        elif self.training:
            out, solution = self.gradient(equation, z, self.solver, self.trace)
        else:
            out, solution = self._evaluate(equation, z, spec)
        self.last_solution, self.last_spec = solution, spec
        out = tell_overflow(equation, out, solution.residual)
        if not self.training:
            # The best of a failed sample is its start, which would pass for a result.
            out = torch.where(solution.residual.isfinite()[:, None], out, torch.nan)
        if self.training:
            if self.inspect is not None:
                with torch.no_grad():
                    self.inspect(equation, solution)
            if self.jacobian_probes:
                self._add_jacobian_loss(equation, solution)
        return spec.unpack(out)

    def forget(self):
        """Let the next solves start cold, whatever was solved before."""
        self.last_spec = None
        self.gradient.forget()

    def take_jacobian_loss(self):
        """The Jacobian loss of the forward passes since the last call.

        Returns:
            Tensor | None: A scalar with gradients, the mean over all samples; None
            where none was computed.
        """
        parts = self._jacobian_losses.take()
        if not parts:
            return None
        return sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)

    def _add_jacobian_loss(self, equation, solution):
        z = solution.value
        generator = None
        if self.jacobian_seed is not None:
            # Each forward pass of one step gets probes of its own.
            seed = self.jacobian_seed + len(self._jacobian_losses)
            generator = torch.Generator(z.device).manual_seed(seed)
        probes = z.new_empty(self.jacobian_probes, *z.shape)
        probes.normal_(generator=generator)
        healthy = equation.healthy(solution.residual.isfinite())
        if not healthy.any():
            return
        # A failed sample has no equilibrium to regularise, and its NaN would reach
        # the shared weights.
        equation, z = replace_failed(equation, z, healthy)
        self._jacobian_losses.add((len(z), hutchinson(equation, z, probes)))

    def _evaluate(self, equation, z, spec):
        """z*, with gradients where somebody wants them."""
        wanted = torch.is_grad_enabled() and any(
            t.requires_grad for t in equation.tensors
        )
        if not wanted:
            observe = self.observe and (
                lambda rows, fz, residual: self.observe(rows, spec.unpack(fz), residual)
            )
            solution = self.eval_solver.solve(
                equation,
                z,
                trace=self.trace,
                drop_finished=z.device.type == 'cpu',
                observe=observe,
            )
            return solution.value, solution
        gradient = ImplicitGradient() if self.gradient.iterates else self.gradient
        try:
            gradient.check(self.eval_solver)
        except ValueError:
            # It shares the inverse that another solver builds.
            gradient = ImplicitGradient()
        out, solution = gradient(equation, z, self.eval_solver, self.trace)
        return solution.value + (out - out.detach()), solution
