"""Solves the equilibria of images in several ways, and keeps what came out."""

import math
import sys
from contextlib import contextmanager
from copy import deepcopy
from numbers import Real

import numpy as np
import torch

from mdeq_mm.engine.residual_plot import QUANTILES, ResidualPlot
from mdeq_mm.implicit import StateSpec, Status, spectral_radius
from mdeq_mm.implicit.layer import recorded
from mdeq_mm.models.implicit_models.equilibrium_report import annotate

from .scoring import build_evaluator, quiet, shown

LIMITS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
# Random starts are further away than zero: what they may take, in limits.
START_FACTOR = 2
# Residual for starts where the evaluation solver has none.
START_TOL = 1e-3
SEED = 0


def limits_up_to(most):
    """Limits of evaluations at which predictions are scored, up to ``most``."""
    return [limit for limit in LIMITS if limit < most] + [most]


@contextmanager
def solver_set(solver, **values):
    """Give a solver other settings meanwhile."""
    before = {name: getattr(solver, name) for name in values}
    vars(solver).update(values)
    try:
        yield
    finally:
        vars(solver).update(before)


class Study:
    """Solves images with a model's evaluation solver, and in other ways.

    Where an image takes several solves, as under sliding windows, the worst residual,
    status and distance count, the sum of the evaluations, and the spectral radius of
    the first solve.

    Args:
        model (nn.Module): With ``backbone.equilibrium``, in evaluation mode.
        cfg (Config): With ``test_evaluator``.
        meta (dict): Of the data set.
        starts (int): Random starts of each image.

    Attributes:
        limits (list[int]): Evaluations at most, at which predictions are scored.
        images (list[dict]): ``path``, ``residual``, ``evaluations`` and ``status`` of
            each image with the evaluation solver; with ``starts`` also
            ``distance``, NaN where fewer than two starts converged, and
            ``failed``, whether the solve from zero failed, and the number of random
            starts that did.
        radii (list[dict]): ``radius`` and ``residual`` of some images.
        plot (ResidualPlot): The traces without a tolerance.
    """

    def __init__(self, model, cfg, meta, starts):
        self.model, self.starts = model, starts
        # A run would start where the last one ended.
        model.backbone.warm_start = False
        self.layer = model.backbone.equilibrium
        self.solver = self.layer.eval_solver
        self.limits = limits_up_to(self.solver.max_steps)
        with quiet():
            self.evaluators = {
                limit: build_evaluator(cfg, meta) for limit in (None, *self.limits)
            }
        self.start_tol = self.solver.tol or START_TOL
        self.start_steps = START_FACTOR * self.solver.max_steps
        self.images, self.radii, self.plot = [], [], None
        self._generator = torch.Generator().manual_seed(SEED)

    @property
    def threshold(self):
        """float: Relative distance above which two equilibria are different ones."""
        return max(10 * self.start_tol, 0.01)

    @torch.no_grad()
    def add(self, batch, looked_at=()):
        """Take in a batch.

        Args:
            batch (dict): As for ``model.test_step``.
            looked_at (Sequence[int]): Images of it whose Jacobian is looked at.
        """
        samples, _, calls = self._predict(batch, None)
        images = [
            dict(
                path=sample.get('img_path'),
                residual=sample.equilibrium_residual,
                evaluations=sample.equilibrium_steps,
                status=sample.equilibrium_status,
            )
            for sample in samples
        ]
        for limit in self.limits[:-1]:
            with solver_set(self.solver, tol=0.0, max_steps=limit):
                self._predict(batch, limit)
        with solver_set(self.solver, tol=0.0):
            plot = ResidualPlot(self.layer, sys.maxsize)
            try:
                _, solutions, calls = self._predict(batch, self.limits[-1])
            finally:
                plot.stop()
        if self.plot is None:
            self.plot = plot
        else:
            self.plot.traces += plot.traces
        for index in looked_at:
            self.radii.append(self._radius(calls[0], solutions[0], index))
        if self.starts:
            self._compare_starts(images, calls)
        self.images += images

    def _predict(self, batch, limit):
        """Predict, score, and return samples, solutions and arguments of solves."""
        calls = []

        def keep(layer, args):
            calls.append(args)

        handle = self.layer.register_forward_pre_hook(keep)
        try:
            with recorded([self.layer]) as solutions:
                # Models write into the samples that they are given.
                samples = self.model.test_step(deepcopy(batch))
        finally:
            handle.remove()
        samples = annotate(samples, solutions)
        self.evaluators[limit].process(data_samples=samples, data_batch=batch)
        return samples, solutions, calls

    def _radius(self, call, solution, index):
        rows = torch.tensor([index], device=solution.value.device)
        equation = self.layer.equation(*call, spec=self.layer.last_spec).take(rows)
        generator = torch.Generator(rows.device).manual_seed(SEED)
        radius = spectral_radius(equation, solution.value[rows], generator=generator)
        return dict(radius=radius.item(), residual=solution.residual[index].item())

    def _compare_starts(self, images, calls):
        """Write into images how far apart equilibria from different starts are."""
        options = dict(tol=self.start_tol, max_steps=self.start_steps, norm='rel')
        with solver_set(self.solver, **options):
            found = [self._solve_from_starts(*call) for call in calls]
        distance, sound = (
            torch.cat(parts, dim=-1) for parts in zip(*found, strict=True)
        )
        # Windows of an image.
        distance = distance.view(-1, len(images)).cpu().numpy()
        sound = sound.view(len(sound), -1, len(images)).all(1).cpu()
        for image, far, ends in zip(
            images, np.fmax.reduce(distance), sound.T.tolist(), strict=True
        ):
            image['distance'] = float(far)
            image['failed'] = [ends[0] is False, ends[1:].count(False)]

    def _solve_from_starts(self, start, *inputs):
        """Solve from zero and from random starts.

        Returns:
            tuple[Tensor, Tensor]: Largest relative distance between two equilibria
            (N,), NaN where fewer than two starts converged; which starts did,
            (1 + starts, N).
        """
        spec = StateSpec.of(start)
        self.layer(start, *inputs)
        first = self.layer.last_solution
        solutions = [first]
        for _ in range(self.starts):
            maps = [self._random_like(m) for m in spec.unpack(first.value)]
            self.layer(maps, *inputs)
            solutions.append(self.layer.last_solution)
        sound = torch.stack([s.converged for s in solutions])
        size = torch.linalg.vector_norm(first.value, dim=1)
        largest = torch.full_like(size, math.nan)
        for i, one in enumerate(solutions):
            for j, other in enumerate(solutions[:i]):
                change = torch.linalg.vector_norm(one.value - other.value, dim=1)
                far = change / size.clamp_min(torch.finfo(size.dtype).tiny)
                largest = torch.where(sound[i] & sound[j], far.fmax(largest), largest)
        return largest, sound

    def _random_like(self, maps):
        """Normal numbers of the scale that each sample of some maps has."""
        scale = maps.flatten(1).square().mean(1).sqrt()
        numbers = torch.randn(maps.shape, generator=self._generator)
        return numbers.to(maps) * scale.view(-1, *[1] * (maps.dim() - 1))

    def figures(self):
        """All that was found.

        Returns:
            dict: ``solver``, ``evaluation``, ``trace``, ``scores``, ``radius``,
            ``starts``, ``images``; the middle ones None where nothing was asked for.
        """
        solver = self.solver
        return dict(
            solver=dict(
                type=type(solver).__name__,
                max_steps=solver.max_steps,
                tol=solver.tol,
                norm=solver.norm,
            ),
            evaluation=self._evaluation(),
            trace={
                f'{share:.0%}': line.tolist()
                for share, line in zip(QUANTILES, self.plot.quantiles(), strict=True)
            },
            scores=self._scores(),
            radius=self._radii() if self.radii else None,
            starts=self._starts() if self.starts else None,
            images=self.images,
        )

    def _evaluation(self):
        statuses = [image['status'] for image in self.images]
        steps = [image['evaluations'] for image in self.images]
        return dict(
            residual=quantiles([image['residual'] for image in self.images]),
            evaluations=quantiles(steps) | dict(mean=float(np.mean(steps))),
            shares={
                s.name.lower(): statuses.count(s.name.lower()) / len(statuses)
                for s in Status
            },
        )

    def _scores(self):
        with quiet():
            found = {
                limit: evaluator.evaluate(len(self.images))
                for limit, evaluator in self.evaluators.items()
            }
        found = {
            limit: {k: float(v) for k, v in metrics.items() if isinstance(v, Real)}
            for limit, metrics in found.items()
        }
        evaluation = found.pop(None)
        return dict(
            shown=shown(evaluation),
            evaluation=evaluation,
            by_limit=[dict(limit=k) | metrics for k, metrics in found.items()],
        )

    def _radii(self):
        radii = [one['radius'] for one in self.radii]
        above = sum(one['residual'] > self.start_tol for one in self.radii)
        return dict(
            images=len(radii),
            median=float(np.median(radii)),
            largest=max(radii),
            at_least_one=sum(r >= 1 for r in radii) / len(radii),
            tol=self.start_tol,
            not_converged=above,
            each=self.radii,
        )

    def _starts(self):
        far = [i['distance'] for i in self.images if not math.isnan(i['distance'])]
        zero, random = zip(*(image['failed'] for image in self.images), strict=True)
        return dict(
            random_starts=self.starts,
            tol=self.start_tol,
            max_steps=self.start_steps,
            threshold=self.threshold,
            judged=len(far),
            median=float(np.median(far)) if far else None,
            largest=max(far, default=None),
            above=sum(d > self.threshold for d in far) / len(far) if far else None,
            zero_not_converged=sum(zero),
            random_not_converged=sum(random),
        )


def quantiles(values):
    """Quantiles of figures that may be infinite, by their names."""
    found = np.quantile(values, QUANTILES, method='nearest')
    return {f'{q:.0%}': v for q, v in zip(QUANTILES, found.tolist(), strict=True)}
