"""Draw what a segmentation model predicts after each evaluation of f.

Writes OUT_DIR/<image>.png, a strip with the prediction after each evaluation and the
curve of the residual, and OUT_DIR/<image>.gif, the same as an animation. The image is
segmented as a whole, whatever the config's test mode.

The prediction after k evaluations is made of f(z_{k-1}), the outcome of the k-th one;
the residual is that of the state it started from. The share under each picture tells
how many pixels have the label that they have in the last one.

Example:
    python tools/analysis_tools/anytime.py CONFIG CHECKPOINT street.png
"""

import argparse
import io
import math
import os.path as osp
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from mmengine.config import DictAction
from PIL import Image

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from common import check_checkpoint_path, fail, read_config

from mdeq_mm.utils.anytime import predict_by_evaluation
from mdeq_mm.utils.inference import load_image, load_model

COLUMNS = 5
FRAME_SECONDS, LAST_SECONDS = 0.5, 2.5


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of a segmentation model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('image', help='image file')
    parser.add_argument(
        '--out-dir',
        default='work_dirs/anytime',
        help='where the pictures go (default: %(default)s)',
    )
    parser.add_argument(
        '--max-steps',
        type=int,
        help="evaluations at most (default: the config's evaluation solver)",
    )
    parser.add_argument(
        '--tol', type=float, help='residual to stop at; 0 takes all evaluations'
    )
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.6,
        help='of the labels (default: %(default)s)',
    )
    parser.add_argument('--device', help='such as cpu or cuda:0')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    args = parser.parse_args(argv)
    if args.max_steps is not None and args.max_steps < 1:
        parser.error(f'--max-steps is {args.max_steps}; it has to be at least 1')
    if args.tol is not None and not 0 <= args.tol < math.inf:
        parser.error(f'--tol is {args.tol}; it has to be 0 or more')
    if not 0 < args.opacity <= 1:
        parser.error(f'--opacity is {args.opacity}; it has to be above 0, at most 1')
    return args


def overlay(image, labels, palette, opacity):
    """Paint labels over an image.

    Args:
        image (np.ndarray): (H, W, 3), uint8, RGB.
        labels (np.ndarray): (H, W), class of each pixel.
        palette (np.ndarray): (classes, 3), uint8, RGB.
        opacity (float): Of the paint, in (0, 1].

    Returns:
        np.ndarray: (H, W, 3), uint8, RGB.
    """
    mixed = (1 - opacity) * image + opacity * palette[labels]
    return mixed.round().astype(np.uint8)


def plot_residuals(axis, snapshots, count=None):
    """Residual over evaluations, the first ``count`` of them."""
    steps = [s.evaluations for s in snapshots]
    residuals = [s.residual for s in snapshots]
    count = count or len(snapshots)
    axis.semilogy(steps, residuals, color='0.85')
    axis.semilogy(steps[:count], residuals[:count], marker='o', color='C0')
    axis.set(xlabel='evaluations of f', ylabel='residual')
    axis.set_xlim(0.5, len(steps) + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def legend(figure, painted, classes, palette):
    """The classes that occur in any of the predictions."""
    present = sorted(set(np.concatenate([np.unique(labels) for labels in painted])))
    handles = [Patch(color=palette[c] / 255, label=classes[c]) for c in present]
    figure.legend(
        handles=handles,
        loc='outside lower center',
        ncols=min(len(handles), 8),
        frameon=False,
        fontsize=9,
    )


def draw_strip(image, snapshots, classes, palette, opacity, path):
    """Image and all predictions, the residual below."""
    painted = [s.labels.numpy() for s in snapshots]
    rows = math.ceil((len(painted) + 1) / COLUMNS)
    height, width = image.shape[:2]
    panel = 3.2 * height / width + 0.45
    figure = plt.figure(figsize=(3.2 * COLUMNS, panel * rows + 3), layout='constrained')
    grid = figure.add_gridspec(rows + 1, COLUMNS, height_ratios=[panel] * rows + [2.3])
    axes = [figure.add_subplot(grid[i // COLUMNS, i % COLUMNS])
            for i in range(len(painted) + 1)]  # fmt: skip
    axes[0].imshow(image)
    axes[0].set_title('image', fontsize=10)
    for axis, snapshot, labels in zip(axes[1:], snapshots, painted, strict=True):
        axis.imshow(overlay(image, labels, palette, opacity))
        same = (labels == painted[-1]).mean()
        axis.set_title(
            f'{snapshot.evaluations}: residual {snapshot.residual:.1e}, {same:.1%}',
            fontsize=10,
        )
    for axis in axes:
        axis.axis('off')
    plot_residuals(figure.add_subplot(grid[rows, :]), snapshots)
    legend(figure, painted, classes, palette)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_animation(image, snapshots, classes, palette, opacity, path):
    """One frame an evaluation: the prediction, and the residual so far."""
    painted = [s.labels.numpy() for s in snapshots]
    height, width = image.shape[:2]
    wide = min(max(width / height, 0.6), 2.2) * 4
    frames = []
    for count, (snapshot, labels) in enumerate(
        zip(snapshots, painted, strict=True), start=1
    ):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(wide + 4, 4.8), width_ratios=[wide, 4], layout='constrained'
        )
        left.imshow(overlay(image, labels, palette, opacity))
        left.axis('off')
        left.set_title(f'{snapshot.evaluations} of {len(painted)} evaluations of f')
        plot_residuals(right, snapshots, count)
        right.set_title(f'residual {snapshot.residual:.1e}')
        legend(figure, painted, classes, palette)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=80)
        plt.close(figure)
        frames.append(Image.open(buffer).convert('RGB'))
    # One palette for all frames, so that colours do not flicker.
    colours = frames[-1].quantize(256)
    frames = [f.quantize(palette=colours, dither=Image.Dither.NONE) for f in frames]
    seconds = [FRAME_SECONDS] * (len(frames) - 1) + [LAST_SECONDS]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * s) for s in seconds],
        loop=0,
    )


def names_and_colours(model, cfg):
    """Classes and palette: of the checkpoint, else of the config's data set."""
    count = model.decode_head.num_classes
    meta = dict(cfg.test_dataloader.dataset.get('metainfo') or {}) | model.dataset_meta
    classes, palette = meta.get('classes'), meta.get('palette')
    if not classes or len(classes) != count:
        classes = [f'class {i}' for i in range(count)]
    if not palette or len(palette) != count:
        colours = plt.get_cmap('tab20')(np.arange(count) % 20)[:, :3] * 255
        palette = colours.round()
    return list(classes), np.array(palette, np.uint8)


def main(argv=None) -> None:
    args = parse_args(argv)
    check_checkpoint_path(args.checkpoint)
    if not osp.isfile(args.image):
        fail(f'the image {args.image!r} does not exist.')
    cfg = read_config(args.config, args.cfg_options)
    if cfg.get('default_scope') != 'mmseg' or not cfg.get('test_dataloader'):
        fail(
            f'{args.config!r} is no segmentation config: it needs default_scope='
            "'mmseg' and a test_dataloader, whose pipeline the image runs through."
        )
    try:
        image = np.asarray(Image.open(args.image).convert('RGB'))
        model = load_model(cfg, args.checkpoint, args.device)
        solver = getattr(getattr(model.backbone, 'equilibrium', None), 'eval_solver', 0)
        if solver:
            solver.max_steps = args.max_steps or solver.max_steps
            solver.tol = solver.tol if args.tol is None else args.tol
        (snapshots,) = predict_by_evaluation(model, load_image(cfg, args.image))
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))

    names = names_and_colours(model, cfg)
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stem = Path(args.image).stem
    draw_strip(image, snapshots, *names, args.opacity, out / f'{stem}.png')
    draw_animation(image, snapshots, *names, args.opacity, out / f'{stem}.gif')
    print(model.backbone.last_solution)
    print(f'{out / stem}.png\n{out / stem}.gif')


if __name__ == '__main__':
    main()
