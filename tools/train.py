"""Train a model from an mmpretrain or mmseg config."""

import argparse
import logging

from common import (
    add_common_arguments,
    build_loops,
    build_runner,
    check_checkpoint_fits,
    check_checkpoint_path,
    check_checkpoint_sound,
    check_data_roots,
    close_process_group,
    fail,
    has_accelerator,
    load_config,
    run,
    set_dataloader_defaults,
    set_launcher,
)
from misspelt import unknown_in_checkpoint_hook
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import OPTIM_WRAPPERS

from mdeq_mm.checkpoints import allow_runner_checkpoints
from mdeq_mm.checkpoints.checkpoint_guard_hook import guard_checkpoints
from mdeq_mm.checkpoints.saving import mend_pointer
from mdeq_mm.registry import name_of

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or the name of a model')
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='where logs and checkpoints go (default: work_dirs/<config name>)',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or, without a value, from the latest one '
        'in the work dir if there is one',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train with automatic mixed precision: float16 on a GPU, bfloat16 on a '
        'CPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size over the config's "
        'auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate while training'
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='restart the workers of the data loaders every epoch',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def enable_amp(cfg: Config) -> None:
    """Replace the optimiser wrapper by its mixed-precision counterpart."""
    name = name_of(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if not has_accelerator() and name in ('OptimWrapper', 'AmpOptimWrapper'):
        # mmengine's own refuses a CPU.
        name = 'EquilibriumOptimWrapper'
    if name.startswith('Amp'):
        print_log(f'The config uses {name}: mixed precision is on already.', 'current')
        return
    if OPTIM_WRAPPERS.get(f'Amp{name}') is None:
        fail(
            f'--amp does not know a mixed-precision counterpart of '
            f'optim_wrapper.type={name!r}; set the type in the config.'
        )
    cfg.optim_wrapper.type = f'Amp{name}'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the command line to the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        enable_amp(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from'):
        check_checkpoint_path(cfg.load_from)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            fail(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config; '
                'set it, for example with --cfg-options '
                'auto_scale_lr.base_batch_size=256.'
            )
        cfg.auto_scale_lr.enable = True
    set_dataloader_defaults(
        cfg, DATALOADERS, args.no_pin_memory, args.no_persistent_workers
    )


def find_resumed(cfg: Config) -> str | None:
    """The checkpoint that training will resume from, None for a fresh start."""
    if not cfg.get('resume'):
        return None
    if cfg.get('load_from'):
        return cfg.load_from
    try:
        latest, said = mend_pointer(cfg.work_dir)
    except FileNotFoundError as error:
        fail(f'{error}.')
    if said is not None:
        print_log(f'{said}: resuming from there.', 'current', logging.WARNING)
    if latest is None:
        print_log(
            f'--resume found no checkpoint in {cfg.work_dir}: training starts anew.',
            logger='current',
            level=logging.WARNING,
        )
    return latest


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    merge_args(cfg, args)
    set_launcher(cfg, args)

    # Not every config carries the hook that does this too.
    allow_runner_checkpoints()
    stages = ['train'] if cfg.get('val_cfg') is None else ['train', 'val']
    check_data_roots(cfg, [f'{stage}_dataloader' for stage in stages])
    runner = build_runner(cfg)
    if said := unknown_in_checkpoint_hook(runner):
        fail(f'the config cannot be used: {said}')
    build_loops(runner, stages)
    resumed = find_resumed(cfg)
    if resumed is not None:
        check_checkpoint_fits(runner, resumed, resume=True)
    elif cfg.get('load_from'):
        check_checkpoint_sound(runner, cfg.load_from)

    guard_checkpoints(runner)
    run(runner.train, cfg)
    del runner
    close_process_group()


if __name__ == '__main__':
    main()
