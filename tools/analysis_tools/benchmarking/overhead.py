"""What a solver costs beside f."""

import statistics

import torch

from mdeq_mm.implicit import AndersonSolver, BroydenSolver, FunctionalModule

from .cases import build_classifier, load_backbone, mdeq_config
from .contractive import captured, spectral_radius
from .measure import clock


def _solvers():
    # tol=0: all evaluations are made.
    return {
        'Anderson(5), 8 evaluations': AndersonSolver(8, tol=0, memory=5),
        'Broyden(8), 8 evaluations': BroydenSolver(8, tol=0, memory=8),
        'Broyden(26), 28 evaluations': BroydenSolver(28, tol=0, memory=26),
    }


@torch.no_grad()
def solver_overhead(settings, rounds):
    """Time of a solve / (evaluations × time of f), from interleaved medians.

    Args:
        settings (Settings): Of the run.
        rounds (int): Repetitions.

    Returns:
        dict[str, dict]: For each solver ``overhead``, ``seconds`` of the solve and
        ``evaluations``; and ``f`` with the ``seconds`` of one evaluation and the
        spectral ``radius`` of its Jacobian at the equilibrium.
    """
    backbone = build_classifier(mdeq_config(settings.size)).backbone
    load_backbone(backbone, settings.weights)
    backbone.to(settings.device, memory_format=settings.memory_format)
    images = settings.images(settings.batch)
    radius = spectral_radius(backbone, images)
    with settings.autocast():
        equation, start, (maps, *inputs) = captured(backbone, images)
        f = FunctionalModule(backbone.equilibrium.f)

        def evaluate():
            f(f.tensors, maps, *inputs)

        solvers = _solvers()
        work = dict(f=evaluate)
        for name, solver in solvers.items():
            work[name] = lambda solver=solver: solver.solve(equation, start)
        times = {name: [] for name in work}
        for count in range(rounds + 1):
            for name, run in work.items():
                # One evaluation is short, and no solve makes less than 8.
                repeats = 8 if name == 'f' else 1
                begin = clock(settings)
                for _ in range(repeats):
                    run()
                if count:
                    times[name].append((clock(settings) - begin) / repeats)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    found = dict(f=dict(seconds=seconds['f'], radius=radius))
    for name, solver in solvers.items():
        found[name] = dict(
            seconds=seconds[name],
            evaluations=solver.max_steps,
            overhead=seconds[name] / (solver.max_steps * seconds['f']),
        )
    return found
