"""The equilibrium as a layer: equation, solver and gradient put together."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .equation import Equation
from .functional import FunctionalModule, check_pure
from .gradients import ImplicitGradient, UnrolledGradient, build_gradient
from .gradients.base import tell_overflow
from .gradients.linearise import replace_failed
from .iteration import FixedIteration
from .jacobian import hutchinson
from .pending import Pending
from .pickling import let_pickle
from .solvers import AndersonSolver, PicardSolver, build_solver
from .solvers.base import finite_rows
from .state import StateSpec, has_channels_last
from .threads import PerThread
from .transforms import transforming


def equilibrium_layers(model):
    """All equilibrium layers in a model, wrapped for distributed training or not.

    Args:
        model (nn.Module): The model.

    Returns:
        list[EquilibriumLayer]: In the order of the model's modules.
    """
    return [m for m in model.modules() if isinstance(m, EquilibriumLayer)]


@contextmanager
def recorded(layers):
    """Collect the solutions of all solves that this thread makes meanwhile.

    Args:
        layers (list[EquilibriumLayer]): Whose solves.

    Yields:
        list[Solution]: In their order.
    """
    found = []
    for layer in layers:
        layer._calls.recorders = (*layer._calls.recorders, found.append)
    try:
        yield found
    finally:
        for layer in layers:
            layer._calls.recorders = layer._calls.recorders[:-1]


class _Calls(PerThread):
    """What the calls of one thread leave, and what watches them."""

    last = (None, None)
    observe = None
    recorders = ()


class EquilibriumLayer(nn.Module):
    """Layer whose output is the equilibrium z* = f(z*, inputs).

    In training the output is f(z*) with gradients, in evaluation z* itself. Where f
    gave nothing finite for a sample, its output is its start in training, so that it
    harms no other sample, and NaN in evaluation.

    f may be changed at any time, as any module: each forward pass takes it as it is
    (see :class:`FunctionalModule`). Several threads may call one layer.

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
        last_solution (Solution | None): Of the last forward pass in the calling
            thread, detached; its ``adjoint`` is that of the last backward pass.
        last_spec (StateSpec | None): How the maps lie in its ``value``.
        unroll_steps (int | None): If set, f is applied this many times in place
            of a solve, in training and evaluation, differentiated directly.
        trace (bool): Whether solutions hold the residual of each step.
        observe (Callable | None): If set, called after each evaluation of f in
            solves of the evaluation mode without gradients, as ``observe(rows,
            maps, residual)``: indices of the samples that are still in the batch,
            f at their iterates as maps (n, ...), and the residuals there (n,). Of
            the calling thread alone.
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
        self.inspect = None
        self._calls = _Calls()
        self.jacobian_probes = 0
        self.jacobian_seed = None
        self._jacobian_losses = Pending()
        check_pure(f)

    @property
    def last_solution(self):
        return self._calls.last[0]

    @last_solution.setter
    def last_solution(self, solution):
        self._calls.last = solution, self.last_spec

    @property
    def last_spec(self):
        return self._calls.last[1]

    @last_spec.setter
    def last_spec(self, spec):
        self._calls.last = self.last_solution, spec

    @property
    def observe(self):
        return self._calls.observe

    @observe.setter
    def observe(self, watcher):
        self._calls.observe = watcher

    def __getstate__(self):
        let_pickle(self.f)
        return super().__getstate__()

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._jacobian_losses = Pending()
        return replica

    def extra_repr(self):
        lines = [f'solver={self.solver}', f'gradient={type(self.gradient).__name__}']
        if self.eval_solver is not self.solver:
            lines.insert(1, f'eval_solver={self.eval_solver}')
        return '\n'.join(lines)

    def equation(self, start: Sequence[Tensor], *inputs: Tensor, spec=None, f=None):
        """The equation of one forward pass.

        Args:
            start (Sequence[Tensor]): Maps of the shapes of the state.
            *inputs (Tensor): What f is given beside the state, (N, ...).
            spec (StateSpec, optional): How the maps lie in the state. Default: in
                the plain memory format.
            f (FunctionalModule, optional): f as it is now.

        Returns:
            Equation: f with weights and inputs fixed.
        """
        spec = spec or StateSpec.of(start)
        f = f or FunctionalModule(self.f)
        count = len(f.tensors)
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
            return spec.pack(f(weights, maps, *inputs), z.dtype)

        return Equation(
            function,
            (*f.tensors, *inputs),
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

        Raises:
            NotImplementedError: If ``torch.func`` transforms it, and its iteration is
                not fixed.
        """
        spec = StateSpec.of(start, channels_last=has_channels_last(start[0]))
        f = FunctionalModule(self.f)
        equation = self.equation(start, *inputs, spec=spec, f=f)
        z = spec.pack(start)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if transforming((z, *equation.tensors)):
            if self.training and self.jacobian_probes:
                raise NotImplementedError(
                    f'jacobian_probes={self.jacobian_probes}: torch.func and forward-'
                    'mode differentiation take no Jacobian loss along; set it to 0'
                )
            self._calls.last = (None, None)
            return spec.unpack(self._iterate(equation, z))
        if self.unroll_steps is not None:
            gradient = UnrolledGradient(self.unroll_steps)
            out, solution = gradient(equation, z, None, self.trace)
        elif self.training:
            out, solution = self.gradient(equation, z, self.solver, self.trace)
        else:
            out, solution = self._evaluate(equation, z, spec)
        self._calls.last = solution, spec
        for record in self._calls.recorders:
            record(solution)
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
        f.hand_back()
        return spec.unpack(out)

    def _iterate(self, equation, z):
        """A fixed number of evaluations of f as plain operations."""
        gradient = self.gradient if self.training else None
        if self.unroll_steps is not None:
            gradient = UnrolledGradient(self.unroll_steps)
        if isinstance(gradient, UnrolledGradient):
            for _ in range(gradient.steps):
                z = z.lerp(equation(z), gradient.damping)
            return z
        solver = self.eval_solver
        fixed = solver.tol == 0 and isinstance(solver, AndersonSolver | PicardSolver)
        if self.training or not fixed:
            name = type(self.gradient).__name__
            raise NotImplementedError(
                'torch.func and forward-mode differentiation take equilibria of a '
                'fixed iteration alone: in evaluation an AndersonSolver or '
                f'PicardSolver with tol=0 (eval_solver is {solver}), in training '
                f'UnrolledGradient (gradient is {name}), or unroll_steps in both'
            )
        iteration = FixedIteration(solver)
        state = iteration.begin(z)
        for _ in range(solver.max_steps):
            state = iteration.step(state, equation(state[0]))
        last, best, least = state[:3]
        if isinstance(solver, PicardSolver):
            # The best iterate may be the start, which no weight has a part in. The
            # last one has been through f most often. (Anderson's weights have no
            # derivative where residuals are zero.)
            usable = finite_rows(last)[:, None]
            best = torch.where(usable, last + (best - last).detach(), best)
        return torch.where(least.isfinite()[:, None], best, torch.nan)

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
