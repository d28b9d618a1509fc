"""Count the evaluations of f that a warm start saves on the frames of a video.

Runs all images of a folder through a model twice, in the order of their names: each
solve from zero, and each from the equilibrium of the frame before. A new sequence
begins, from zero, where the name before the last number changes, or the image size.

Prints, for each sequence and for all: frames, evaluations of f and seconds a frame
(median), the residual (95th percentile), and the share of labels (pixels, or images of
a classifier) that are the same both ways.

Example:
    python tools/analysis_tools/warm_start.py CONFIG CHECKPOINT FRAMES --tol 1e-2
"""

import argparse
import itertools
import json
import os.path as osp
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from common import check_checkpoint_path, fail, read_config
from options import add_model_options, add_solver_options, check_options

from mdeq_mm.apis.inference import load_image, load_model

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
WAYS = ('from zero', 'warm')


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of a model with an MDEQ backbone')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('frames', help='folder of images')
    add_solver_options(parser)
    parser.add_argument('--limit', type=int, help='frames at most (default: all)')
    parser.add_argument('--json', metavar='FILE', help='write the figures there too')
    add_model_options(parser)
    args = parser.parse_args(argv)
    check_options(
        parser,
        args,
        dict(limit=1),
        needs_tol='without a tolerance a warm start saves nothing',
    )
    return args


def sequences(folder, limit=None):
    """The images of a folder by sequence.

    Args:
        folder (Path): Where they are.
        limit (int, optional): Most of them.

    Returns:
        dict[str, list[Path]]: By what comes before the last number of a name; in
        natural order, frame 10 after frame 9.
    """

    def natural(path):
        # Texts and numbers take turns, so that only alike is compared.
        parts = re.split(r'(\d+)', path.stem)
        return [int(p) if i % 2 else p for i, p in enumerate(parts)]

    paths = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES]
    found = {}
    for path in sorted(paths, key=natural)[:limit]:
        name = re.sub(r'\d+\D*$', '', path.stem).rstrip('_- ') or folder.name
        found.setdefault(name, []).append(path)
    return found


class Counter:
    """Counts the evaluations of all solves of a layer, as a context manager."""

    def __init__(self, layer):
        self.layer = layer
        self.clear()

    def __enter__(self):
        self.handle = self.layer.register_forward_hook(self._count)
        return self

    def __exit__(self, *error):
        self.handle.remove()

    def clear(self):
        self.steps, self.residual = 0, 0.0

    def _count(self, module, inputs, output):
        solution = self.layer.last_solution
        self.steps += int(solution.steps.sum())
        self.residual = max(self.residual, float(solution.residual.max()))


def labels_of(sample):
    """Predicted labels of a data sample, of pixels or of the image."""
    if hasattr(sample, 'pred_sem_seg'):
        return sample.pred_sem_seg.data.cpu()
    return sample.pred_label.cpu()


@torch.no_grad()
def measure(model, counter, batch):
    """Predict once.

    Returns:
        tuple: Evaluations of f, seconds, the residual and the labels.
    """
    counter.clear()
    begin = time.perf_counter()
    (sample,) = model.test_step(batch)
    labels = labels_of(sample)
    return counter.steps, time.perf_counter() - begin, counter.residual, labels


def run(model, cfg, frames):
    """Predict the frames of one sequence, both ways side by side.

    Returns:
        dict: Lists with an entry a frame: for each way ``evaluations``, ``seconds``
        and ``residual``; and ``same``, the share of labels that agree.
    """
    backbone, layer = model.backbone, model.backbone.equilibrium
    found = {way: dict(evaluations=[], seconds=[], residual=[]) for way in WAYS}
    same, last = [], (None, None)
    for path in frames:
        batch = load_image(cfg, path)
        labels = []
        for way in WAYS:
            backbone.warm_start = way == 'warm'
            if backbone.warm_start:
                layer.last_solution, layer.last_spec = last
            with Counter(layer) as counter:
                steps, seconds, residual, label = measure(model, counter, batch)
            entries = found[way]
            entries['evaluations'].append(steps)
            entries['seconds'].append(seconds)
            entries['residual'].append(residual)
            labels.append(label)
        last = layer.last_solution, layer.last_spec
        same.append(float((labels[0] == labels[1]).float().mean()))
    return found | dict(same=same)


def summary(found):
    """Figures of some frames: means, medians and percentiles of :func:`run`."""
    out = dict(frames=len(found['same']), same=float(np.mean(found['same'])))
    for way in WAYS:
        out[way] = dict(
            evaluations=float(np.mean(found[way]['evaluations'])),
            seconds=float(np.median(found[way]['seconds'])),
            residual=float(np.percentile(found[way]['residual'], 95)),
        )
    return out


def joined(parts):
    """The lists of several sequences, one after the other."""

    def join(lists):
        return list(itertools.chain.from_iterable(lists))

    out = dict(same=join(p['same'] for p in parts))
    for way in WAYS:
        out[way] = {k: join(p[way][k] for p in parts) for k in parts[0][way]}
    return out


def table_of(rows):
    table = Table(title='from zero / warm')
    table.add_column('sequence')
    for name in ('frames', 'evaluations', 's a frame', 'residual', 'same labels, %'):
        table.add_column(name, justify='right', no_wrap=name != 'same labels, %')
    for name, row in rows.items():
        zero, warm = (row[way] for way in WAYS)
        table.add_row(
            name,
            str(row['frames']),
            f'{zero["evaluations"]:.1f} / {warm["evaluations"]:.1f}',
            f'{zero["seconds"]:.3f} / {warm["seconds"]:.3f}',
            f'{zero["residual"]:.0e} / {warm["residual"]:.0e}',
            f'{100 * row["same"]:.2f}',
        )
    return table


def main(argv=None) -> None:
    args = parse_args(argv)
    check_checkpoint_path(args.checkpoint)
    folder = Path(args.frames)
    if not folder.is_dir():
        fail(f'the folder {args.frames!r} does not exist.')
    groups = sequences(folder, args.limit)
    if not groups:
        fail(f'the folder {args.frames!r} has no images ({", ".join(IMAGES)}).')
    cfg = read_config(args.config, args.cfg_options)
    if not cfg.get('test_dataloader'):
        fail(f'{args.config!r} has no test_dataloader, whose pipeline the frames take.')
    try:
        model = load_model(cfg, args.checkpoint, args.device)
        layer = getattr(model.backbone, 'equilibrium', None)
        if layer is None:
            fail(f'{args.config!r} has no backbone of type MDEQ.')
        layer.eval_solver.max_steps = args.max_steps or layer.eval_solver.max_steps
        layer.eval_solver.tol = args.tol or layer.eval_solver.tol
        # The first run of all is slower than the others.
        first = next(iter(groups.values()))[0]
        with Counter(layer) as counter:
            measure(model, counter, load_image(cfg, first))
        found = {}
        console = Console(stderr=True)
        for name, frames in groups.items():
            layer.last_solution = None
            frames = track(frames, name, console=console)
            found[name] = run(model, cfg, frames)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    rows = {name: summary(part) for name, part in found.items()}
    if len(rows) > 1:
        rows['all'] = summary(joined(list(found.values())))
    console = Console()
    console.print(table_of(rows))
    console.print(f'tolerance {layer.eval_solver.tol:g}, at most '
                  f'{layer.eval_solver.max_steps} evaluations')  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + '\n')
        print(args.json)


if __name__ == '__main__':
    main()
