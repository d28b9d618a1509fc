"""The one loop of all solvers."""

import math

import torch
from torch import Tensor

from ..build import build
from ..checks import check_int, is_number
from ..solution import Solution, Status


def build_solver(cfg, field='solver'):
    """Build a solver from ``dict(type=..., ...)``; see :func:`build`."""
    return build('solver', cfg, field)


def check_backward(solver, field):
    """Refuse a solver that the backward pass cannot use."""
    if solver.norm != 'rel':
        raise ValueError(
            f'{field}.norm={solver.norm!r} cannot be used: the backward solve runs on '
            "a gradient scaled to unit norm, use 'rel'"
        )
    if solver.drop_finished:
        raise ValueError(
            f'{field}.drop_finished=True cannot be used: the backward solve runs on f '
            'recorded for the whole batch, use None or False'
        )


def finite_rows(t: Tensor):
    """Which samples of t (N, D) are finite, (N,) bool.

    One pass over the numbers, several times faster than ``isfinite().all(1)``:
    whatever is not finite makes the sum so. A sum of finite numbers that overflows
    counts as not finite too.
    """
    return t.sum(1).isfinite()


def residual_of(z: Tensor, fz: Tensor, norm='rel'):
    """Residual of each sample, (N,); infinite where f(z) - z is not finite.

    Args:
        z (Tensor): (N, D).
        fz (Tensor): (N, D), f(z).
        norm (str): ``'rel'`` or ``'abs'``, as :class:`Solver` has them.
    """
    change = torch.linalg.vector_norm(fz - z, dim=1)
    residual = change
    if norm == 'rel':
        limits = torch.finfo(z.dtype)
        scale = torch.linalg.vector_norm(fz, dim=1)
        # f(z) = z = 0 has a residual of zero, not 0/0; where f(z) alone is
        # zero it is large, which is no reason to give up.
        residual = (change / scale.clamp_min(limits.tiny)).clamp_max(limits.max)
    return torch.where(change.isfinite(), residual, math.inf)


class Solver:
    """Base of all solvers: finds z with f(z) = z, for each sample by itself.

    A subclass says how the next iterate is made (:meth:`init`, :meth:`step`,
    :meth:`take`). The loop here owns everything else: the best iterate, when a
    sample is done and why, the trace, non-finite values, and samples that leave
    the batch once they are done.

    Args:
        max_steps (int): Most evaluations of f a sample may take.
        tol (float): Residual below which a sample is done. 0 always runs
            ``max_steps`` evaluations.
        norm (str): ``'rel'``, the residual is ||f(z) - z|| / ||f(z)||, or
            ``'abs'``, it is ||f(z) - z||; Euclidean norms over one sample.
        drop_finished (bool, optional): Whether finished samples leave the batch,
            so that a batch costs the sum of its samples' evaluations. Default:
            the caller decides (:class:`EquilibriumLayer`: in evaluation on a
            CPU).
        check_every (int): Whether anything is left to do is looked at after every
            so many evaluations. Each look makes the host wait for a GPU; samples
            that are done wait in any case, and their results stay as they are.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.
    """

    # A sample is STALLED once its residual, relative to f(z), is within ``floor``
    # rounding errors of f and fell by less than 1 % over ``idle`` evaluations. Larger
    # residuals that rest, or rise, often fall later.
    floor = 2
    idle = 10

    def __init__(
        self,
        max_steps=30,
        tol=1e-3,
        norm='rel',
        drop_finished=None,
        check_every=1,
    ):
        check_int('max_steps', max_steps, 1)
        check_int('check_every', check_every, 1)
        if not is_number(tol):
            raise TypeError(f'tol must be a number, got {tol!r}')
        if not 0 <= tol < math.inf:
            raise ValueError(
                f'tol={tol} must be finite and at least 0; 0 runs all max_steps '
                'evaluations'
            )
        if norm not in ('rel', 'abs'):
            raise ValueError(f"norm={norm!r} is unknown: use 'rel' or 'abs'")
        if drop_finished is not None and not isinstance(drop_finished, bool):
            raise TypeError(
                f'drop_finished must be True, False or None, got {drop_finished!r}'
            )
        self.max_steps = int(max_steps)
        self.tol = float(tol)
        self.norm = norm
        self.drop_finished = drop_finished
        self.check_every = int(check_every)

    def __repr__(self):
        fields = ', '.join(f'{k}={v!r}' for k, v in vars(self).items())
        return f'{type(self).__name__}({fields})'

    # What a subclass says

    def init(self, z: Tensor):
        """The solver's state before the first step; None where it has none."""
        return None

    def step(self, state, z: Tensor, fz: Tensor):
        """The next iterate, (N, D), from z and f(z). May change ``state``."""
        raise NotImplementedError

    def take(self, state, index: Tensor):
        """The state of some of the samples."""
        return state

    # The loop

    def measure(self, z: Tensor, fz: Tensor):
        """Residual of each sample, (N,); infinite where it is not finite."""
        return residual_of(z, fz, self.norm)

    @torch.no_grad()
    def solve(
        self,
        equation,
        start: Tensor,
        *,
        trace=False,
        drop_finished=False,
        observe=None,
        keep_state=False,
        precision=None,
    ):
        """Find the fixed point of an equation.

        Args:
            equation (Callable): ``equation(z) -> f(z)``, both (N, D); with
                ``take(index)`` if samples are to leave the batch.
            start (Tensor): (N, D), the first iterate. Non-finite samples start
                from zero.
            trace (bool): Whether to keep the residual of each evaluation.
            drop_finished (bool): Used where the solver itself does not say.
            observe (Callable, optional): Called after each evaluation as
                ``observe(rows, fz, residual)``: indices of the samples that are
                still in the batch, f at their iterates (n, D), and the residuals
                there (n,).
            keep_state (bool): Whether to return the solver's state too; no sample
                leaves the batch then.
            precision (torch.dtype, optional): Coarsest type that f computes in.
                Default: that of the equation, or that of ``start``.

        Returns:
            Solution: Never raises because a sample did not converge, and never
            returns a non-finite value: look at ``status`` and ``residual``. With
            ``keep_state`` a pair of it and the state.
        """
        drop = drop_finished if self.drop_finished is None else self.drop_finished
        drop = drop and not keep_state
        finite = finite_rows(start)
        z = start
        if not (_known(finite) and finite.all()):
            z = torch.where(finite[:, None], start, torch.zeros_like(start))
        precision = precision or getattr(equation, 'precision', None) or z.dtype
        progress = _Progress(self, z, precision)
        parts = []
        rows = torch.arange(len(z), device=z.device)
        residuals = []
        state = self.init(z)
        for count in range(1, self.max_steps + 1):
            fz = equation(z)
            residual = self.measure(z, fz)
            if trace:
                line = z.new_full((len(start),), math.nan)
                line[rows] = torch.where(progress.running, residual, math.nan)
                residuals.append(line)
            if observe is not None:
                observe(rows, fz, residual)
            progress.update(z, fz, residual)
            if count == self.max_steps:
                break
            left = None
            if count % self.check_every == 0:
                # The only synchronisation of a step.
                left = int(progress.running.sum())
                if left == 0:
                    break
            if drop and left is not None and left < len(z):
                parts.append(progress.fields(rows, ~progress.running))
                keep = progress.running.nonzero().squeeze(1)
                equation, state = equation.take(keep), self.take(state, keep)
                # One by one: the histories leave little room for copies.
                rows, progress = rows[keep], progress.take(keep)
                z = z[keep]
                fz = fz[keep]
            z = self._advance(state, z, fz, progress, left == len(z))
        trace = torch.stack(residuals) if trace else None
        if progress.value is start:
            # It is the caller's.
            progress.value = start.clone()
        if keep_state:
            return Solution(**progress.fields(rows)[1], trace=trace), state
        # The history makes room for the results.
        del state, z, fz
        parts.append(progress.fields(rows))
        del progress
        return Solution(**_joined(parts, len(start)), trace=trace)

    def _advance(self, state, z, fz, progress, everyone):
        """The next iterate; samples that are done wait at their best one.

        Args:
            state: The solver's.
            z (Tensor): (N, D).
            fz (Tensor): (N, D).
            progress (_Progress): Of these samples.
            everyone (bool): Whether all of them are known to be running, which
                spares passes over the state.
        """
        running = progress.running[:, None]
        if not everyone:
            # A sample that is done may have a non-finite f(z): keep it out of the
            # solver's history, which is shared memory though not shared numbers.
            fz = torch.where(running, fz, z)
        new = self.step(state, z, fz)
        usable = finite_rows(new)
        if not (_known(usable) and usable.all()):
            new = torch.where(usable[:, None], new, fz)
        if everyone:
            return new
        # The masked copy, before another one is made.
        del fz
        return torch.where(running, new, progress.value)


def _known(mask):
    """Whether a mask can be looked at without a synchronisation."""
    return mask.device.type == 'cpu'


class _Progress:
    """Best iterate and status of the samples that are in the batch."""

    def __init__(self, solver, z, precision):
        self.solver = solver
        self.floor = solver.floor * torch.finfo(precision).eps
        n = len(z)
        self.value = z
        self.residual = z.new_full((n,), math.inf)
        self.steps = torch.zeros(n, dtype=torch.int64, device=z.device)
        self.status = torch.full_like(self.steps, Status.MAX_STEPS)
        self.running = torch.ones_like(self.steps, dtype=torch.bool)
        # Of f at the best iterate.
        self.size = self.residual.clone()
        # Residual that counts as the last progress, and evaluations since then.
        self.anchor = self.residual.clone()
        self.idle = torch.zeros_like(self.steps)

    def update(self, z, fz, residual):
        """Take in one evaluation: f(z) (N, D) and residuals (N,) at z."""
        solver = self.solver
        better = self.running & (residual < self.residual)
        if _known(better) and better.all():
            # Iterates are never written to, so there is nothing to copy.
            self.value = z
        else:
            self.value = torch.where(better[:, None], z, self.value)
        self.residual = torch.where(better, residual, self.residual)
        self.steps += self.running
        moved = residual < 0.99 * self.anchor
        self.anchor = torch.where(moved, residual, self.anchor)
        self.idle = torch.where(moved, torch.zeros_like(self.idle), self.idle + 1)

        ends = [(~residual.isfinite(), Status.DIVERGED)]
        if solver.tol > 0:
            floor = self.floor
            if solver.norm == 'abs':
                size = torch.linalg.vector_norm(fz, dim=1)
                self.size = torch.where(better, size, self.size)
                floor = floor * self.size
            stalled = (self.idle >= solver.idle) & (self.residual <= floor)
            ends += [
                (stalled, Status.STALLED),
                (residual <= solver.tol, Status.CONVERGED),
            ]
        done = torch.zeros_like(self.running)
        for mask, status in ends:
            mask = mask & self.running
            self.status = torch.where(mask, int(status), self.status)
            done |= mask
        self.running = self.running & ~done

    def take(self, index):
        new = object.__new__(type(self))
        for key, value in vars(self).items():
            setattr(new, key, value[index] if torch.is_tensor(value) else value)
        return new

    def fields(self, rows, mask=None):
        """Of all samples or some of them: their rows in the whole batch, and results.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: Rows, and fields of a Solution.
        """
        names = ('value', 'residual', 'steps', 'status')
        found = {name: getattr(self, name) for name in names}
        if mask is None:
            return rows, found
        index = mask.nonzero().squeeze(1)
        return rows[index], {name: value[index] for name, value in found.items()}


def _joined(parts, total):
    """The results of the whole batch from those of its parts."""
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1]
    result = {k: v.new_empty(total, *v.shape[1:]) for k, v in first.items()}
    while parts:
        rows, found = parts.pop()
        for key, value in found.items():
            result[key][rows] = value
    return result
