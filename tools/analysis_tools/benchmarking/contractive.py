"""Weights for which f converges.

A random f is not contractive: no solver converges on it, and what is measured then
says nothing about a trained model. A few steps with the Jacobian loss make it so.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from mdeq_mm.implicit import (
    AndersonSolver,
    Gradient,
    StateSpec,
    UnrolledGradient,
    hutchinson,
)
from mdeq_mm.implicit import spectral_radius as radius_of
from mdeq_mm.implicit.state import has_channels_last

from .cases import build_classifier, mdeq_config
from .progress import progress

#: Counts changes of what is below, so that older files are not used.
VERSION = 2
#: Side of the first branch, in pixels, and images a batch. f is convolutional: what
#: holds at a low resolution holds at others.
SIDE, BATCH = 16, 4
LEARNING_RATE = 1e-3
JACOBIAN_WEIGHT = 1.0
MOST_ITERATIONS = 6
#: Residual after 8 evaluations at which the training ends, and where it is looked at.
TARGET, EVERY, MOST_STEPS = 2e-3, 5, 400


class RegularisedSteps(Gradient):
    """Some iterations, the last one recorded, and the Jacobian loss there.

    How many is drawn anew each time, so that f contracts on the whole way from the
    start to the equilibrium.

    Attributes:
        jacobian (Tensor): The Jacobian loss of the last forward pass.
    """

    iterates = True

    def __call__(self, equation, start, solver=None, trace=False):
        with torch.no_grad():
            for _ in range(int(torch.randint(MOST_ITERATIONS, ()))):
                start = equation(start)
        out, solution = UnrolledGradient(1)(equation, start)
        probes = torch.stack([torch.randn_like(start), dominant(equation, out)])
        self.jacobian = hutchinson(equation, out, probes)
        return out, solution


def dominant(equation, z, products=4):
    """Directions in which products with J' grow, (N, D), as long as normal noise.

    A random probe weighs all directions alike and hardly sees the few that decide
    whether f contracts.
    """
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        fz = equation(point)
    v = torch.randn_like(z)
    for _ in range(products):
        (v,) = torch.autograd.grad(fz, point, v, retain_graph=True)
        v = F.normalize(v, dim=1) * v.shape[1] ** 0.5
    return v


def contractive_weights(size, folder, fresh=False):
    """The file with a contractive backbone; made first where it is not there.

    Args:
        size (str): Arch of the MDEQ.
        folder (Path): Where such files are kept.
        fresh (bool): Whether to make it in any case.

    Returns:
        Path: A state dict of the backbone.
    """
    path = Path(folder) / f'contractive_{size}_v{VERSION}.pth'
    if fresh or not path.exists():
        state = train(size)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that is stopped while writing leaves no half file behind.
        partial = path.with_suffix('.partial')
        torch.save(state, partial)
        partial.replace(path)
    return path


def train(size):
    """Train a backbone, on noise with random labels, until f contracts.

    Args:
        size (str): Arch of the MDEQ.

    Returns:
        dict[str, Tensor]: State of the backbone.

    Raises:
        RuntimeError: If it does not within ``MOST_STEPS`` steps.
    """
    config = mdeq_config(size)
    config.backbone.drop_rate = 0
    model = build_classifier(config)
    backbone = model.backbone
    # The random labels keep f from becoming constant.
    gradient = backbone.equilibrium.gradient = RegularisedSteps()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    side = SIDE << backbone.arch.downsample_times
    generator = torch.Generator().manual_seed(0)
    steps = range(1, MOST_STEPS + 1)
    for step in progress(steps, 'Making f contractive (ends early)'):
        images = torch.randn(BATCH, 3, side, side, generator=generator)
        labels = torch.randint(1000, (BATCH,), generator=generator)
        model.train()
        loss = F.cross_entropy(model(images, mode='tensor'), labels)
        loss = loss + JACOBIAN_WEIGHT * gradient.jacobian
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 and residual(backbone, images) < TARGET:
            return backbone.state_dict()
    raise RuntimeError(
        f'f of arch {size!r} did not become contractive in {MOST_STEPS} steps: give a '
        'checkpoint of a trained model with --weights'
    )


@torch.no_grad()
def residual(backbone, images):
    """Largest relative residual after 8 evaluations by Anderson acceleration."""
    equation, start, _ = captured(backbone, images)
    return AndersonSolver(max_steps=8, tol=0).solve(equation, start).residual.max()


def spectral_radius(backbone, images):
    """Spectral radius of the Jacobian of f at the equilibrium, the largest of them."""
    with torch.no_grad():
        equation, start, _ = captured(backbone, images)
        z = AndersonSolver(max_steps=20, tol=1e-4).solve(equation, start).value
    return float(radius_of(equation, z, iterations=20).max())


def captured(backbone, images):
    """What a backbone solves in evaluation.

    Returns:
        tuple: The equation, its start (N, D), and the arguments of the layer: the
        start as maps, and the inputs of f.
    """
    layer, seen = backbone.equilibrium, []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    solver, layer.eval_solver = layer.eval_solver, AndersonSolver(max_steps=1)
    backbone.eval()
    try:
        backbone(images)
    finally:
        handle.remove()
        layer.eval_solver = solver
    (arguments,) = seen
    maps = arguments[0]
    spec = StateSpec.of(maps, channels_last=has_channels_last(maps[0]))
    return layer.equation(*arguments, spec=spec), spec.pack(maps).float(), arguments
