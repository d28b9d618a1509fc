"""A small training in a process of its own, that can be killed at any point."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mdeq_mm.checkpoints import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]

#: Moments of writing a checkpoint.
POINTS = ('half written', 'before renaming', 'after renaming', 'pointer emptied')


def config(data_root, work_dir, by_epoch=True, workers=0, exact=True, **options):
    """A training of 24 iterations that has all kinds of state and randomness.

    Args:
        exact (bool): Whether it has the hook.
        **options: As for ``--cfg-options``.
    """
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='RandomCrop', crop_size=32, padding=3),
        dict(type='RandomFlip', prob=0.5),
        dict(type='ColorJitter', brightness=0.5, contrast=0.5),
        dict(type='RandomErasing', erase_prob=0.5),
        dict(type='PackInputs'),
    ]
    cfg = Config.fromfile(ROOT / 'configs/demo/mdeq_jacobian_1xb64-30e_digits.py')
    cfg.model.backbone.arch = dict(
        channels=(8, 8), num_groups=4, expansion=1, dropout=0.2, downsample_times=2
    )
    cfg.model.backbone.gradient = dict(
        type='ImplicitGradient',
        solver=dict(type='AndersonSolver', max_steps=4, tol=1e-2),
        warm_start=True,
    )
    cfg.model.backbone.update(warm_start=True, in_channels=3)
    cfg.data_preprocessor.update(mean=[78.0] * 3, std=[96.0] * 3)
    cfg.model.neck.in_channels = (8, 8)
    cfg.model.head.in_channels = 16
    loader = cfg.train_dataloader
    loader.update(
        batch_size=4, num_workers=workers, persistent_workers=workers > 0,
        drop_last=False,
    )  # fmt: skip
    loader.dataset.pipeline = pipeline
    for name in ('train', 'val', 'test'):
        dataset = cfg[f'{name}_dataloader'].dataset
        dataset.data_root = str(data_root)
        dataset.pipeline[0].pop('color_type', None)
    interval = 1 if by_epoch else 3
    if by_epoch:
        cfg.train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
    else:
        cfg.train_cfg = dict(by_epoch=False, max_iters=24, val_interval=6)
        loader.sampler.type = 'InfiniteSampler'
        cfg.log_processor.by_epoch = False
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=8),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=8, end=24, T_max=16),
    ]
    hooks = cfg.default_hooks
    if not exact:
        hooks.pop('exact_resume')
    hooks.checkpoint = dict(
        type='CheckpointHook', interval=interval, max_keep_ckpts=1, by_epoch=by_epoch,
        save_best='accuracy/top1', rule='greater',
    )  # fmt: skip
    hooks.warmup = dict(
        type='UnrollWarmupHook', unroll_steps=2, end=12, threshold=10.0, interval=2,
        readings=4,
    )  # fmt: skip
    hooks.jacobian.update(frequency=0.5, by_epoch=False)
    hooks.jacobian.pop('end', None)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(options)
    return cfg


def run(data_root, work_dir, resume=False, kill_at=None, rank=None, **options):
    """Train, to the end or to a point where the process kills itself.

    Args:
        rank (int, optional): Of this process, one of two.
        kill_at (tuple[str, int], optional): One of :data:`POINTS`, and how often it
            is passed before.
        **options: Of :func:`config`.
    """
    if kill_at is not None:
        _kill_at(*kill_at)
    cfg = config(data_root, work_dir, **options)
    cfg.resume = resume
    if rank is not None:
        _join(rank, f'{work_dir}.store{int(resume)}', cfg)
    Runner.from_cfg(cfg).train()


def _join(rank, store, cfg):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=2
    )
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None
    )


def _kill_at(point, passed):
    from mdeq_mm.checkpoints import saving

    left = [passed]

    def due():
        left[0] -= 1
        return left[0] < 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    replace, put = os.replace, saving.AtomicLocalBackend.put

    def put_half(self, obj, filepath):
        if due():
            path = Path(str(filepath) + saving.PARTIAL)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(obj[: len(obj) // 2])
            die()
        put(self, obj, filepath)

    def replaced(source, target):
        if point == 'before renaming' and due():
            die()
        replace(source, target)
        if point == 'after renaming' and due():
            die()

    if point == 'half written':
        saving.AtomicLocalBackend.put = put_half
    elif point == 'pointer emptied':
        import builtins

        plain = open

        def opened(file, mode='r', *args, **kwargs):
            handle = plain(file, mode, *args, **kwargs)
            if str(file).endswith('last_checkpoint') and 'w' in mode and due():
                die()
            return handle

        builtins.open = opened
    else:
        os.replace = replaced


_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['tests.killed_training', 'mdeq_mm', 'mmpretrain'])


def start(*args, **kwargs):
    """Start :func:`run` in a process of its own, without importing all once more."""
    process = _context.Process(target=_quiet, args=args, kwargs=kwargs)
    process.start()
    return process


def _quiet(*args, **kwargs):
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    log = os.open(f'{args[1]}.err', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    run(*args, **kwargs)


def contents(path):
    """What a checkpoint holds that decides what follows, by name."""
    checkpoint = read_checkpoint(str(path))
    kept = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    return dict(_flat({key: checkpoint[key] for key in kept if key in checkpoint}))


def _flat(value, name=''):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f'{name}.{key}')
    elif isinstance(value, list | tuple):
        for key, part in enumerate(value):
            yield from _flat(part, f'{name}.{key}')
    else:
        yield name, value
