"""Evaluate a checkpoint with an mmpretrain or mmseg config."""

import argparse
import os.path as osp
from copy import deepcopy

import mmengine
from common import (
    add_common_arguments,
    build_loops,
    build_runner,
    check_checkpoint_fits,
    check_checkpoint_path,
    check_data_roots,
    close_process_group,
    fail,
    load_config,
    run,
    set_dataloader_defaults,
    set_launcher,
)
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

from mdeq_mm.checkpoints import allow_runner_checkpoints
from mdeq_mm.checkpoints.checkpoint_guard_hook import guard_checkpoints
from mdeq_mm.registry import name_of

DATALOADERS = ('test_dataloader',)
# What mmengine's DumpResults, and mmengine.dump for metrics, can write.
SUFFIXES = {'pred': ('.pkl', '.pickle'), 'metrics': ('.json', '.yaml', '.yml', '.pkl')}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or the name of a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='where the log and the metrics go (default: work_dirs/<config name>)',
    )
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='file for the predictions (.pkl) or metrics (.json, .yaml, .pkl); with '
        'an mmseg config also a folder, for the predictions as label images',
    )
    parser.add_argument(
        '--out-item',
        choices=['pred', 'metrics'],
        help='what --out stores (default: pred)',
    )
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='folder for images with their predictions drawn on them',
    )
    parser.add_argument(
        '--show', action='store_true', help='show the predictions in a window'
    )
    parser.add_argument(
        '--interval',
        type=int,
        default=1,
        help='draw or show every so many samples (default: 1; mmseg draws all)',
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that a window stays open (default: 2)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation: the config's tta_model and tta_pipeline, or, "
        'for classification, the mean over an image and its mirror image',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def check_out(args: argparse.Namespace, cfg: Config) -> None:
    """Refuse an --out that nothing could be written to, before the evaluation."""
    if args.out is None:
        if args.out_item is not None:
            fail(f'--out-item {args.out_item} needs --out FILE.')
        return
    if writes_label_images(args, cfg):
        return
    item = args.out_item or 'pred'
    if not args.out.endswith(SUFFIXES[item]):
        fail(
            f'--out {args.out!r} cannot hold {item}: its name has to end in '
            f'{", ".join(SUFFIXES[item])}.'
        )


def writes_label_images(args: argparse.Namespace, cfg: Config) -> bool:
    """Whether --out is the folder that mmseg's metric writes label images to."""
    return (
        cfg.get('default_scope') == 'mmseg'
        and args.out is not None
        and args.out_item in (None, 'pred')
        and osp.splitext(args.out)[1] == ''
    )


def set_label_image_dir(cfg: Config, out: str) -> None:
    """Let mmseg's metric write its predictions to a folder."""
    evaluators = cfg.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, list) else [evaluators]
    for evaluator in evaluators:
        if name_of(evaluator['type']) == 'MultiTaskMetric':
            seg = evaluator.get('seg', [])
            evaluators += seg if isinstance(seg, list) else [seg]
        if name_of(evaluator['type']) == 'IoUMetric':
            evaluator['output_dir'] = out
            return
    fail(f'--out {out!r} is a folder, which needs an IoUMetric in test_evaluator.')


def set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Switch on the visualisation hook of mmpretrain or mmseg."""
    if args.interval < 1:
        fail(f'--interval is {args.interval}; it has to be at least 1.')
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        fail(
            '--show and --show-dir need a hook that draws: add visualization='
            "dict(type='VisualizationHook') (mmseg: 'SegVisualizationHook') to "
            'default_hooks.'
        )
    hook.interval = args.interval
    hook.show = args.show
    hook.wait_time = args.wait_time
    if name_of(hook.type).endswith('SegVisualizationHook'):
        hook.draw = True
        if args.show_dir is not None:
            cfg.visualizer.save_dir = args.show_dir
    else:
        hook.enable = True
        hook.out_dir = args.show_dir


def set_tta(cfg: Config) -> None:
    """Wrap the model and replace the pipeline for test-time augmentation."""
    if cfg.get('default_scope') == 'mmpretrain':
        # Its predictions tell of the equilibria of all versions, where there are any.
        cfg.setdefault('tta_model', ConfigDict(type='ImplicitClsTTAModel'))
        if 'tta_pipeline' not in cfg:
            *loading, packing = deepcopy(cfg.test_dataloader.dataset.pipeline)
            flips = [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)]
            both = dict(type='TestTimeAug', transforms=[flips, [packing]])
            cfg.tta_pipeline = [*loading, both]
    if name_of(cfg.test_dataloader.dataset.type) == 'MultiTaskDataset':
        fail(
            '--tta augments the images of one task: evaluate the joint checkpoint '
            'with the config of that task.'
        )
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        fail(f'--tta needs {" and ".join(missing)} in the config.')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the command line to the config."""
    cfg.load_from = args.checkpoint
    # A config dumped by a resumed training says True, and would look for the
    # state of an optimiser.
    cfg.resume = False
    if args.show or args.show_dir is not None:
        set_visualization(cfg, args)
    if args.tta:
        set_tta(cfg)
    if writes_label_images(args, cfg):
        set_label_image_dir(cfg, args.out)
    set_dataloader_defaults(cfg, DATALOADERS, args.no_pin_memory)


def main() -> None:
    args = parse_args()
    check_checkpoint_path(args.checkpoint)
    cfg = load_config(args)
    for name in ('test_dataloader', 'test_cfg', 'test_evaluator'):
        if cfg.get(name) is None:
            fail(f'the config {args.config!r} has no {name}: nothing to evaluate.')
    check_out(args, cfg)
    merge_args(cfg, args)
    set_launcher(cfg, args)

    # Not every config carries the hook that does this too.
    allow_runner_checkpoints()
    check_data_roots(cfg, DATALOADERS)
    runner = build_runner(cfg)
    build_loops(runner, ['test'])
    check_checkpoint_fits(runner, args.checkpoint)
    stores_file = args.out is not None and not writes_label_images(args, cfg)
    if stores_file and args.out_item != 'metrics':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))

    guard_checkpoints(runner)
    metrics = run(runner.test, cfg)
    if stores_file and args.out_item == 'metrics' and runner.rank == 0:
        mmengine.dump(metrics, args.out)
    del runner
    close_process_group()


if __name__ == '__main__':
    main()
