"""Draw what a segmentation model predicts after each evaluation of f.

Writes OUT_DIR/<image>.png, a strip with the prediction after each evaluation and the
curve of the residual, and OUT_DIR/<image>.gif, the same as an animation. The image is
segmented as a whole, whatever the config's test mode.

The prediction after k evaluations is made of f(z_{k-1}), the outcome of the k-th one;
the residual is that of the state it started from. Above each picture there is the
share of the pixels that have the label that they have in the last one.

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
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from common import check_checkpoint_path, fail, read_config
from options import add_model_options, add_opacity, add_solver_options, check_options

from mdeq_mm.apis.anytime import predict_by_evaluation
from mdeq_mm.apis.inference import load_image, load_model
from mdeq_mm.registry import name_of

# Of a strip and one of its pictures, were it of 4:3, in inches.
STRIP_WIDTH, PICTURE_WIDTH = 16, 3.2
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
    add_solver_options(parser)
    add_opacity(parser)
    add_model_options(parser)
    args = parser.parse_args(argv)
    check_options(parser, args)
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
    axis.semilogy(steps[:count], residuals[:count], marker='o', color='black')
    axis.set(xlabel='evaluations of f', ylabel='residual')
    axis.set_xlim(0.5, len(steps) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)


def legend(figure, painted, classes, palette):
    """The classes that occur in any of the predictions."""
    present = sorted(set(np.concatenate([np.unique(labels) for labels in painted])))
    handles = [Patch(color=palette[c] / 255, label=classes[c]) for c in present]
    # Inches of a patch, the gaps beside it, and a name.
    entry = 0.6 + 0.08 * max(len(classes[c]) for c in present)
    figure.legend(
        handles=handles,
        loc='outside lower center',
        ncols=min(len(handles), max(1, int(figure.get_figwidth() / entry))),
        frameon=False,
        fontsize=9,
    )


def agreement(labels, last):
    """Share of equal labels, as a text that says 100% of nothing less."""
    same = (labels == last).mean()
    return f'{same if same == 1 else min(same, 0.999):.1%}'


def draw_strip(image, snapshots, classes, palette, opacity, path):
    """Image and all predictions, the residual below."""
    painted = [s.labels.numpy() for s in snapshots]
    ratio = image.shape[1] / image.shape[0]
    # Pictures of equal areas; titles need a width.
    width = min(max(PICTURE_WIDTH * math.sqrt(ratio * 3 / 4), 2), STRIP_WIDTH)
    columns = min(int(STRIP_WIDTH / width), len(painted) + 1)
    width = STRIP_WIDTH / max(columns, int(STRIP_WIDTH / width))
    rows = math.ceil((len(painted) + 1) / columns)
    panel = width / ratio + 0.35
    figure = plt.figure(
        figsize=(max(width * columns, STRIP_WIDTH / 2), panel * rows + 3.4),
        layout='constrained',
    )
    figure.suptitle(
        'evaluations of f: residual, share of pixels labelled as at the end',
        fontsize=11,
    )
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[panel] * rows + [2.3])
    axes = [figure.add_subplot(grid[i // columns, i % columns])
            for i in range(len(painted) + 1)]  # fmt: skip
    axes[0].imshow(image)
    axes[0].set_title('image', fontsize=10)
    for axis, snapshot, labels in zip(axes[1:], snapshots, painted, strict=True):
        axis.imshow(overlay(image, labels, palette, opacity))
        axis.set_title(
            f'{snapshot.evaluations}: {snapshot.residual:.1e}, '
            f'{agreement(labels, painted[-1])}',
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
    frames = share_palette(frames)
    seconds = [FRAME_SECONDS] * (len(frames) - 1) + [LAST_SECONDS]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * s) for s in seconds],
        loop=0,
    )


def share_palette(frames):
    """Reduce frames to 256 colours, the same in all, so that none flickers."""
    few = [frames[0], frames[len(frames) // 2], frames[-1]]
    few = Image.fromarray(np.concatenate([np.asarray(frame) for frame in few]))
    colours = few.quantize(256)
    return [f.quantize(palette=colours, dither=Image.Dither.NONE) for f in frames]


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


def read_image(path):
    """Read an image, (H, W, 3), uint8, RGB, the way up that pipelines have it."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    except OSError as error:
        fail(f'the image {path!r} cannot be read: {error}.')


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
    if name_of(cfg.test_dataloader.dataset.type) == 'MultiTaskDataset':
        fail(
            f'{args.config!r} is of joint training: give the segmentation config, '
            'which the joint checkpoint fits too.'
        )
    out = Path(args.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        image = read_image(args.image)
        model = load_model(cfg, args.checkpoint, args.device)
        solver = getattr(getattr(model.backbone, 'equilibrium', None), 'eval_solver', 0)
        if solver:
            solver.max_steps = args.max_steps or solver.max_steps
            solver.tol = solver.tol if args.tol is None else args.tol
        (snapshots,) = predict_by_evaluation(model, load_image(cfg, args.image))
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))

    names = names_and_colours(model, cfg)
    stem = Path(args.image).stem
    draw_strip(image, snapshots, *names, args.opacity, out / f'{stem}.png')
    draw_animation(image, snapshots, *names, args.opacity, out / f'{stem}.gif')
    print(model.backbone.last_solution)
    print(f'{out / stem}.png\n{out / stem}.gif')


if __name__ == '__main__':
    main()
