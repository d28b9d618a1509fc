"""Compute the project's own golden numbers, tests/golden/mdeq_tiny.pt.

A small classifier is trained for a moment, unrolled and with the Jacobian term,
until its map is contractive. The numbers then come from plain loops over f in
float64, without the package's solvers, gradients and equations: the equilibrium by
fixed-point iteration until nothing changes, gradients by differentiating through a
long iteration. Tests compare the package with them.

Example:
    python dev/make_golden.py tests/golden/mdeq_tiny.pt --force
"""

import argparse
import sys
from pathlib import Path

import mmpretrain.models  # noqa: F401
import torch
from mmengine.registry import init_default_scope
from torch.nn.functional import cross_entropy

import mdeq_mm  # noqa: F401
from mdeq_mm.implicit import hutchinson, spectral_radius
from mdeq_mm.registry import MODELS

CHANNELS, CLASSES = (4, 8, 8), 4
CONFIG = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MDEQ',
        # As in the official model.
        arch=dict(
            channels=CHANNELS,
            num_groups=4,
            expansion=2,
            downsample_times=1,
            injection='first',
        ),
        out_norm_cfg=None,
        init_cfg=[
            dict(type='Normal', layer='Conv2d', std=0.01),
            dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1, bias=0),
        ],
    ),
    neck=[
        dict(
            type='MDEQFuseScales',
            in_channels=CHANNELS,
            head_channels=(2, 2, 2),
            out_channels=8,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=8),
)
#: Plain iterations; with a spectral radius below 0.6, 0.6**100 is below 1e-22.
ITERATIONS = 100


def batch(generator, count):
    """Noisy images (count, 3, 14, 11) with a stripe pattern for each class."""
    target = torch.randint(CLASSES, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(14), torch.arange(11), indexing='ij')
    waves = [rows, columns, rows + columns, rows - columns]
    patterns = torch.stack([torch.sin(wave * 0.9) for wave in waves])
    noise = torch.randn(count, 3, 14, 11, generator=generator)
    return patterns[target][:, None] + 0.5 * noise, target


def logits_of(model, maps):
    for neck in model.neck:
        maps = neck(maps)
    return model.head(maps)


def iterate(backbone, images, steps):
    """Apply f from zero, by a plain loop.

    Returns:
        tuple[list[Tensor], list[Tensor], Tensor]: The last iterate, the one before
        it, and the injection.
    """
    (injection,) = backbone.inject(images)
    n, _, height, width = injection.shape
    maps = []
    for channels in CHANNELS:
        maps.append(injection.new_zeros(n, channels, height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    for _ in range(steps):
        before, maps = maps, backbone.equilibrium.f(maps, injection)
    return maps, before, injection


def train(model, generator, steps=400, weight=0.5):
    """Make the model contractive."""
    backbone = model.backbone.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        images, target = batch(generator, 16)
        maps, _, injection = iterate(backbone, images, 5)
        loss = cross_entropy(logits_of(model, maps), target)
        equation = backbone.equilibrium.equation(maps, injection)
        z = torch.cat([m.flatten(1) for m in maps], dim=1)
        loss = loss + weight * hutchinson(equation, z, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def gradients(model, images, target, steps):
    """Logits, loss and gradients in training mode, through ``steps`` iterations."""
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.zero_grad()
    logits = logits_of(model, iterate(model.backbone, images, steps)[0])
    loss = cross_entropy(logits, target)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    # The running statistics of the norms changed on the way.
    model.load_state_dict(statistics)
    model.eval()
    return dict(logits=logits.detach(), loss=loss.detach(), grads=grads)


def compute(seed=4):
    """All golden numbers.

    Raises:
        RuntimeError: If the training did not make the map contractive.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    init_default_scope('mmpretrain')
    model = MODELS.build(CONFIG)
    model.init_weights()
    train(model, generator)
    state = {
        k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()
    }
    model.double().eval()

    images, target = batch(generator, 3)
    inputs = images.double()
    with torch.no_grad():
        maps, before, injection = iterate(model.backbone, inputs, ITERATIONS)
        logits = logits_of(model, maps)
        equation = model.backbone.equilibrium.equation(maps, injection)
        probe = [torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in maps]
        value = model.backbone.equilibrium.f(probe, injection)
    radius = spectral_radius(
        equation, torch.cat([m.flatten(1) for m in maps], 1), generator=generator
    )
    change = max((a - b).abs().max().item() for a, b in zip(maps, before, strict=True))
    if radius.max() > 0.6 or change > 1e-12:
        raise RuntimeError(
            f'the map is not contractive enough: spectral radius {radius.max():.2f}, '
            f'last change {change:.0e}; train it longer'
        )
    return dict(
        config=CONFIG,
        # Flat, since a file format that keeps tensors apart makes many small ones
        # large.
        names=list(state),
        weights=torch.cat([v.flatten() for v in state.values()]),
        input=images,
        target=target,
        injection=injection,
        f_input=probe,
        f_output=value,
        equilibrium=maps,
        logits=logits,
        spectral_radius=radius,
        parameters=[name for name, _ in model.named_parameters()],
        implicit=gradients(model, inputs, target, ITERATIONS),
        unrolled=gradients(model, inputs, target, 5),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('out', type=Path, help='where to write the numbers')
    # Of the first seeds, the one whose map is hardest: a radius of 0.43.
    parser.add_argument('--seed', type=int, default=4)
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    args = parser.parse_args(argv)
    if args.out.exists() and not args.force:
        sys.exit(f'{args.out} exists: choose another name, or give --force')
    torch.set_num_threads(1)
    golden = compute(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(golden, args.out)
    print(
        f'{args.out}: {args.out.stat().st_size / 1000:.0f} kB, '
        f'{len(golden["implicit"]["grads"])} parameters, spectral radius '
        f'{golden["spectral_radius"].max():.2f}'
    )


if __name__ == '__main__':
    main()
