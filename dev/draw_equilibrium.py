"""Draw what an equilibrium is: the figure of docs/equilibrium.md.

On the left the plain iteration and Anderson acceleration on a function of one
variable; on the right what a trained MDEQ thinks of a handwritten digit after each
evaluation of f.

Example:
    python dev/draw_equilibrium.py --image docs/images/digit.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

import mdeq_mm
from mdeq_mm.apis.inference import load_image
from mdeq_mm.implicit import AndersonSolver, PicardSolver


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--image', default='docs/images/digit.png', help='default: %(default)s'
    )
    parser.add_argument('--model', default='mdeq-digits', help='default: %(default)s')
    parser.add_argument(
        '--out',
        default='work_dirs/equilibrium.png',
        type=Path,
        help='default: %(default)s',
    )
    return parser.parse_args(argv)


def f(z):
    """The function on the left; its slope at the equilibrium is -.88."""
    return 1.2 * torch.cos(z)


def iterates(solver, start):
    """The states that a solver evaluates f at.

    Returns:
        list[float]: From the first on.
    """
    seen = []

    def watched(z):
        seen.append(z.item())
        return f(z)

    solver.solve(watched, torch.full((1, 1), start, dtype=torch.float64))
    return seen


def draw_iterations(axis):
    """Both iterations as paths between the diagonal and the graph of f."""
    grid = np.linspace(-0.05, 1.35, 200)
    axis.plot(grid, f(torch.tensor(grid)), color='black', label='f(z)')
    axis.plot(grid, grid, color='grey', linewidth=0.8, label='z')
    settings = dict(max_steps=100, tol=1e-3)
    for name, solver in (
        ('plain iteration', PicardSolver(**settings)),
        ('Anderson acceleration', AndersonSolver(**settings)),
    ):
        z = iterates(solver, 0.0)
        # Up or down to the graph, then across to the next state.
        x = np.repeat(z, 2)
        y = np.column_stack([z, f(torch.tensor(z))]).ravel()
        label = f'{name}: {len(z)} evaluations'
        axis.plot(x, y, marker='.', markersize=4, linewidth=1, label=label)
    axis.set(xlabel='z', ylabel='f(z)', title='Two ways to z* = f(z*)')
    axis.legend(fontsize=8, loc='lower left')


@torch.no_grad()
def probabilities(model, batch):
    """What a classifier makes of the states on the way to the equilibrium.

    Returns:
        tuple[Tensor, Tensor]: Probabilities after each evaluation (steps, classes),
        and residuals (steps,).
    """
    data = model.data_preprocessor(batch, False)
    layer = model.backbone.equilibrium
    found, residuals = [], []

    def look(rows, maps, residual):
        logits = model.head(model.neck(model.backbone.outputs(maps)))
        found.append(logits.softmax(1)[0])
        residuals.append(residual[0])

    layer.observe = look
    try:
        model.backbone(data['inputs'])
    finally:
        layer.observe = None
    return torch.stack(found), torch.stack(residuals)


def draw_prediction(axis, args):
    """Lines of the probabilities, and the image in a corner."""
    model = mdeq_mm.get_model(args.model, pretrained=True, device='cpu')
    batch = load_image(mdeq_mm.get_config(args.model), args.image)
    found, residuals = probabilities(model, batch)
    steps = range(1, len(found) + 1)
    likely = found.amax(0).topk(3).indices.tolist()
    classes = model.dataset_meta['classes']
    for index in likely:
        axis.plot(steps, found[:, index], marker='.', label=f'"{classes[index]}"')
    axis.set(
        xlabel='evaluations of f', ylabel='probability', title='A prediction settles'
    )
    axis.set_ylim(-0.03, 1.03)
    axis.legend(loc='center right', fontsize=8)
    below = axis.twinx()
    below.semilogy(steps, residuals, color='grey', linestyle=':')
    below.set_ylabel('residual (dotted)')
    inset = axis.inset_axes([0.42, 0.36, 0.22, 0.32])
    inset.imshow(plt.imread(args.image), cmap='gray')
    inset.axis('off')


def main(argv=None):
    args = parse_args(argv)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    draw_iterations(left)
    draw_prediction(right, args)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == '__main__':
    main()
