"""Report how well the equilibria of a trained MDEQ are found on its test set.

Takes images that are spread evenly over the test set of a classification or
segmentation config, and reports:

- residuals, evaluations of f and how the solves ended, with the evaluation solver;
- the residual over the evaluations, and the score of the config's test evaluator by
  the limit of evaluations, both without a tolerance;
- the spectral radius of the Jacobian, below 1 where plain iteration converges too;
- whether each image has one equilibrium: how far apart those are that are reached
  from zero and from random starts.

Writes OUT_DIR/convergence.json, convergence.md and convergence.png.

Example:
    python tools/analysis_tools/convergence.py CONFIG CHECKPOINT --images 100
"""

import argparse
import os.path as osp
import sys
from pathlib import Path

import numpy as np
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(0, osp.dirname(osp.abspath(__file__)))
from common import (
    check_checkpoint_path,
    check_data_roots,
    fail,
    merge_options,
    read_config,
    set_data_root,
)
from convergence_report.picture import draw
from convergence_report.study import Study
from convergence_report.writing import sections, to_json
from options import add_model_options, add_solver_options, check_options

from mdeq_mm.apis.inference import load_model

# Columns of the terminal, where the output goes to a file.
FILE_WIDTH = 120


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of a model with an MDEQ backbone')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--images',
        type=int,
        default=200,
        help='images at most, spread evenly over the test set (default: %(default)s)',
    )
    parser.add_argument(
        '--out-dir',
        default='work_dirs/convergence',
        help='where the report goes (default: %(default)s)',
    )
    add_solver_options(parser)
    parser.add_argument(
        '--radius-images',
        type=int,
        default=8,
        help='images whose Jacobian is looked at; 0 leaves it out (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--starts',
        type=int,
        default=3,
        help='random starts of each image; 0 leaves them out (default: %(default)s)',
    )
    parser.add_argument('--data-root', metavar='DIR', help='folder of the data set')
    add_model_options(parser)
    args = parser.parse_args(argv)
    least = dict(images=1, radius_images=0, starts=0)
    check_options(
        parser, args, least, needs_tol='without a tolerance nothing converges'
    )
    return args


def build_dataset(cfg):
    """The test set of a config."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    check_data_roots(cfg, ['test_dataloader'])
    try:
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        found = len(dataset)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        fail(f'the data set of test_dataloader cannot be read: {error}')
    if found == 0:
        fail('the data set of test_dataloader has no images.')
    return dataset


def spread(total, count):
    """Numbers below ``total``, ``count`` of them at most, spread evenly."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def study_images(study, cfg, dataset, images, radius_images):
    """Take some images of a data set into a study, with a bar on stderr.

    Args:
        study (Study): Takes them in.
        cfg (Config): Whose ``test_dataloader`` says how many are a batch.
        dataset (Dataset): Test set.
        images (int): How many of them, at most.
        radius_images (int): How many the spectral radius is taken of.
    """
    chosen = spread(len(dataset), images).tolist()
    looked_at = set(spread(len(chosen), radius_images).tolist())
    size = min(cfg.test_dataloader.get('batch_size') or 1, len(chosen))
    loader = DataLoader(
        Subset(dataset, chosen),
        size,
        num_workers=cfg.test_dataloader.get('num_workers', 0),
        collate_fn=pseudo_collate,
    )
    console = Console(stderr=True)
    text = f'{len(chosen)} images' + (f', {size} at once' if size > 1 else '')
    for number, batch in enumerate(track(loader, text, console=console)):
        first = number * size
        mine = [i - first for i in looked_at if first <= i < first + size]
        study.add(batch, sorted(mine))


def main(argv=None) -> None:
    args = parse_args(argv)
    check_checkpoint_path(args.checkpoint)
    cfg = read_config(args.config)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    merge_options(cfg, args.cfg_options)
    for name in ('test_dataloader', 'test_evaluator'):
        if not cfg.get(name):
            fail(f'the config {args.config!r} has no {name}: nothing to solve.')
    dataset = build_dataset(cfg)
    out = Path(args.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        model = load_model(cfg, args.checkpoint, args.device)
        layer = getattr(getattr(model, 'backbone', None), 'equilibrium', None)
        if layer is None:
            fail(f'{args.config!r} has no backbone of type MDEQ.')
        layer.eval_solver.max_steps = args.max_steps or layer.eval_solver.max_steps
        layer.eval_solver.tol = args.tol or layer.eval_solver.tol
        meta = getattr(dataset, 'metainfo', {})
        study = Study(model, cfg, meta, args.starts)
        study_images(study, cfg, dataset, args.images, args.radius_images)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        fail(str(error))

    figures = study.figures()
    source = dict(
        config=args.config, checkpoint=args.checkpoint, test_images=len(dataset)
    )
    tables = sections(figures)
    title = f'{Path(args.config).stem}, {len(figures["images"])} images'
    (out / 'convergence.json').write_text(to_json(source | figures))
    (out / 'convergence.md').write_text(
        f'# {title}\n\nCheckpoint `{args.checkpoint}`, {len(figures["images"])} of the '
        f'{len(dataset)} images of the test set.\n\n'
        + '\n'.join(table.markdown() for table in tables)
        + '\n![](convergence.png)\n'
    )
    draw(figures, title, out / 'convergence.png')
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for table in tables:
        table.show(console)
    for name in ('json', 'md', 'png'):
        print(out / f'convergence.{name}')


if __name__ == '__main__':
    main()
