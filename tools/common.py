"""What train.py and test.py share: reading, checking and completing a config."""

import argparse
import difflib
import gc
import inspect
import logging
import os
import os.path as osp
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
from misspelt import unknown_setting
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from mmengine.runner import Runner

import mdeq_mm
from mdeq_mm.apis.index import config_path, find_entry, similar
from mdeq_mm.checkpoints import (
    check_finite,
    check_no_more,
    check_resumable,
    check_state_dict,
    read_checkpoint,
    state_dict_of,
)
from mdeq_mm.data_guard import check_processes_agree
from mdeq_mm.models import MDEQ
from mdeq_mm.models.backbones.pretrained import adapt_channels
from mdeq_mm.registry import name_of
from mdeq_mm.tasks import SCOPES

# OneDL's mmcv comes without compiled operators and says so at every start; no
# model here uses them.
warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')
# The official segmentation head aligns corners at all sizes; mmseg advises others.
warnings.filterwarnings('ignore', 'When align_corners=True, the output would more')

# What torchrun sets for each of its processes.
TORCHRUN_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')

# What the names of wrappers and strategies that shard weights have in them.
SHARDING = ('FullySharded', 'FSDP', 'DeepSpeed', 'Colossal')


def fail(message: str) -> NoReturn:
    """End the program with one sentence that the user can act on."""
    sys.exit(f'{osp.basename(sys.argv[0])}: error: {message}')


def has_accelerator() -> bool:
    """Whether models are placed on anything but the CPU."""
    return get_device() != 'cpu'


def is_remote(path: str) -> bool:
    """Whether a path carries a scheme, such as https:// or s3://, to be resolved
    by mmengine's file backends and not by the file system.
    """
    return re.match(r'\w[\w-]+:', path) is not None


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that train.py and test.py have in common."""
    parser.add_argument(
        '--data-root',
        metavar='DIR',
        help='folder of the data set, for the training, validation and test sets '
        'alike (short for --cfg-options *_dataloader.dataset.data_root=DIR)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config; lists as key="[a,b]" or key=a,b, '
        'nested ones as key="[(a,b),(c,d)]", without white space',
    )
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not pin the memory of the data loaders',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher (see dist_train.sh and slurm_train.sh)',
    )
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help='what old versions of torch.distributed.launch pass on',
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read a config and apply --data-root, --cfg-options and --work-dir.

    The work dir is the one of the command line, else the config's, else
    ``./work_dirs/<name of the config>``.
    """
    cfg = read_config(args.config)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    merge_options(cfg, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(cfg.filename))[0]
        cfg.work_dir = osp.join('./work_dirs', name)
    return cfg


def find_config(path: str) -> str:
    """The file of a config: itself, or that of the model of such a name."""
    if osp.isfile(path):
        return path
    try:
        return config_path(path)
    except ValueError:
        close = similar(path)
    hint = f' Did you mean {" or ".join(close)}?' if close else ''
    fail(f'the config {path!r} does not exist.{hint}')


def find_weights(config: str, checkpoint: str | None) -> str | None:
    """The checkpoint, or in its place the weights that are published by a name."""
    if checkpoint is not None or osp.isfile(config):
        return checkpoint
    return find_entry(config).weights


def read_config(path: str, options: dict | None = None) -> Config:
    """Read a config, by its file or its model's name, and merge --cfg-options."""
    path = find_config(path)
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        fail(
            f'the config {path!r} imports a module that cannot be imported '
            f'({error.__cause__ or error}); install it in this environment.'
        )
    except (KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        fail(f'the config {path!r} cannot be read: {error}')
    merge_options(cfg, options)
    return cfg


def merge_options(cfg: Config, options: dict | None) -> None:
    """Merge --cfg-options into a config."""
    if options is None:
        return
    for option in options:
        _check_known(option.split('.')[0], cfg)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        fail(f'--cfg-options does not fit {cfg.filename!r}: {error}')


def _check_known(key: str, cfg: Config) -> None:
    """Refuse a key that looks like one of the config, which would have no effect."""
    known = {*cfg, *inspect.signature(Runner).parameters}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if key not in known and close:
        fail(
            f'--cfg-options: {key!r} is no key of {cfg.filename!r}; did you mean '
            f'{close[0]!r}?'
        )


def iter_datasets(cfg: Config, fields: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Yield (path, config) of each data set, those inside wrappers included.

    The path is the one that --cfg-options takes, as in
    ``train_dataloader.dataset.datasets.cls``.
    """

    def descend(path, dataset):
        if 'dataset' in dataset:
            yield from descend(f'{path}.dataset', dataset['dataset'])
        elif 'datasets' in dataset:
            parts = dataset['datasets']
            if isinstance(parts, dict):
                # MultiTaskDataset looks each up in the toolbox of its task.
                for task, part in parts.items():
                    part.setdefault('_scope_', SCOPES.get(task))
            else:
                parts = dict(enumerate(parts))
            for key, part in parts.items():
                yield from descend(f'{path}.datasets.{key}', part)
        else:
            yield path, dataset

    for field in fields:
        loader = cfg.get(field)
        if loader is not None and 'dataset' in loader:
            yield from descend(f'{field}.dataset', loader['dataset'])


def set_data_root(cfg: Config, data_root: str) -> None:
    """Point the training, validation and test sets to one folder."""
    fields = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    datasets = dict(iter_datasets(cfg, fields))
    roots = {
        osp.normpath(d['data_root']) for d in datasets.values() if d.get('data_root')
    }
    if len(roots) > 1:
        options = ' '.join(f'{path}.data_root=DIR' for path in datasets)
        fail(
            f'--data-root {data_root!r} is ambiguous: the config has several data '
            f'roots ({", ".join(sorted(roots))}); leave it out and override each: '
            f'--cfg-options {options}'
        )
    for dataset in datasets.values():
        dataset['data_root'] = data_root


def check_data_roots(cfg: Config, fields: Sequence[str]) -> None:
    """Refuse data roots that do not exist, before any work is done.

    Remote folders, and data sets that download themselves, are left alone.
    """
    # The runner does it later, after it has said much else.
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    for path, dataset in iter_datasets(cfg, fields):
        root = dataset.get('data_root')
        if root and is_remote(root):
            continue
        cls = dataset['type']
        if isinstance(cls, str):
            scope = dataset.get('_scope_')
            with DATASETS.switch_scope_and_registry(scope) as registry:
                cls = registry.get(cls)
        if root and not osp.isdir(root):
            if cls is not None and 'download' in inspect.signature(cls).parameters:
                continue
            fail(
                f'{path}.data_root is {root!r}, which is not a folder; give the folder '
                f'of the data set with --data-root, or with --cfg-options '
                f'{path}.data_root=DIR, or link it to that place.'
            )
        check_has_images(path, dataset, cls)


def check_has_images(path: str, dataset: dict, cls: type | None) -> None:
    """Refuse a segmentation data set without images.

    mmengine fails to serialise it, without a word of why; where it is told not to,
    the sampler of iteration-based training looks for a first sample without end.
    """
    if not hasattr(cls, 'get_label_map'):
        return
    try:
        found = len(DATASETS.build(dict(dataset, pipeline=[], serialize_data=False)))
    except (AssertionError, OSError, ValueError) as error:
        fail(f'{path} cannot be read: {error}')
    if found == 0:
        fail(
            f'{path} finds no images in {dataset.get("data_root")!r} with '
            f'data_prefix={dict(dataset.get("data_prefix", {}))}; give the folder of '
            'the data set with --data-root, or correct data_prefix and img_suffix.'
        )


def build_loops(runner: Runner, stages: Sequence[str]) -> None:
    """Build the loops of some stages, and refuse data sets that cannot be read.

    The runner builds them itself when it gets there, with a traceback where a
    folder is missing, and for the validation set after a while only.
    """
    for stage in stages:
        try:
            getattr(runner, f'{stage}_loop')
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            if said := unknown_setting(error, runner.cfg):
                fail(f'the config cannot be used: {said}')
            if isinstance(error, TypeError) and _said_by_us(error) is None:
                raise
            fail(f'the data set of {stage}_dataloader cannot be read: {error}')
        try:
            check_processes_agree(
                getattr(runner, f'{stage}_loop'), f'{stage}_dataloader'
            )
        except ValueError as error:
            fail(f'{error}.')


def set_dataloader_defaults(
    cfg: Config,
    fields: Sequence[str],
    no_pin_memory: bool = False,
    no_persistent_workers: bool = False,
) -> None:
    """Complete the data loaders as the toolboxes' own tools do."""
    for field in fields:
        loader = cfg.get(field)
        if loader is None:
            continue
        loader.setdefault('pin_memory', has_accelerator())
        loader.setdefault('persistent_workers', True)
        if no_pin_memory:
            loader['pin_memory'] = False
        # PyTorch refuses persistent workers where there are no workers.
        if no_persistent_workers or not loader.get('num_workers'):
            loader['persistent_workers'] = False
        # mmseg's images differ in size and are not stacked here.
        if cfg.get('default_scope') == 'mmpretrain':
            loader.setdefault('collate_fn', ConfigDict(type='default_collate'))


def set_launcher(cfg: Config, args: argparse.Namespace) -> None:
    """Store the launcher, and make it work on machines without an accelerator.

    mmengine's launchers select a CUDA device and hand it to the distributed
    wrapper, both of which fail on a CPU. There the process group is opened here,
    with the gloo backend.
    """
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'none':
        return
    if args.launcher == 'pytorch':
        missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
        if missing:
            fail(
                f'--launcher pytorch needs the environment of torchrun '
                f'({", ".join(missing)} not set); start it with tools/dist_train.sh '
                'or tools/dist_test.sh.'
            )
    if has_accelerator():
        return
    if args.launcher != 'pytorch':
        fail(
            f'--launcher {args.launcher} needs an accelerator on every machine; on '
            'CPUs use --launcher pytorch (tools/dist_train.sh, tools/dist_test.sh).'
        )
    cfg.setdefault('env_cfg', ConfigDict())
    cfg.env_cfg.setdefault('dist_cfg', ConfigDict())
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.setdefault(
        'model_wrapper_cfg',
        ConfigDict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ),
    )
    cfg.model_wrapper_cfg.setdefault('device_ids', None)
    torch.distributed.init_process_group('gloo')
    replaced = replace_sync_bn(cfg)
    if not is_main_process():
        return
    print_log(
        'No accelerator was found: the processes run on the CPU and talk over gloo.',
        logger='current',
    )
    if replaced:
        print_log(
            'SyncBN needs GPUs: batch norms use the statistics of each process by '
            'itself (BN) instead.',
            logger='current',
            level=logging.WARNING,
        )


def replace_sync_bn(cfg: Config) -> int:
    """Let a model run on several CPU processes, where PyTorch has no SyncBN.

    On one process mmengine does this by itself.

    Returns:
        int: Number of settings that were replaced.
    """

    def replace(node):
        count = 0
        if isinstance(node, dict):
            if name_of(node.get('type')) in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
                node['type'] = 'BN'
                count += 1
            count += sum(replace(v) for v in node.values())
        elif isinstance(node, list | tuple):
            count += sum(replace(v) for v in node)
        return count

    # The Runner's own way to ask for it.
    whole = cfg.pop('sync_bn', None) is not None
    return replace(cfg.model) + whole


def check_not_sharded(cfg: Config) -> None:
    """Refuse to shard an MDEQ, before a strategy does."""
    if 'MDEQ' not in str(cfg.get('model')):
        return
    for field in ('model_wrapper_cfg', 'strategy'):
        name = name_of((cfg.get(field) or {}).get('type', ''))
        if any(word in name for word in SHARDING):
            fail(
                f'{field}.type={name!r} shards the weights, of which an equilibrium '
                'layer needs all at every evaluation of f: use '
                'MMDistributedDataParallel, or leave it out; an MDEQ has at most 90 '
                'million parameters.'
            )


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config asks for."""
    check_not_sharded(cfg)
    try:
        return Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    except (TypeError, ValueError) as error:
        # mmengine's registries wrap what a class raises. What this package says
        # about a config is a sentence for its user; anything else is a fault.
        said = unknown_setting(error, cfg) or _said_by_us(error)
        if said is None:
            raise
        fail(f'the config cannot be used: {said}')


def run(work: Callable[[], object], cfg: Config) -> object:
    """Run a loop of the runner.

    What this package refuses, such as data or a checkpoint to start from, ends it
    with a sentence, and so does a misspelt setting; anything else is a fault and keeps
    its traceback.
    """
    try:
        return work()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        # mmengine's registries wrap what a class raises.
        said = unknown_setting(error, cfg) or _said_by_us(error)
        if said is None:
            raise
        fail(str(said))


def _said_by_us(error: BaseException) -> BaseException | None:
    """What this package raised among the causes of an exception."""
    while error is not None and not _is_ours(error):
        error = error.__context__
    return error


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised an exception."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return origin.startswith(osp.dirname(mdeq_mm.__file__))


def close_process_group() -> None:
    """Leave the process group, where there is one, together and in good order.

    Call it without a reference to the runner: a distributed wrapper that outlives
    the group ends its threads while Python shuts down, and now and then aborts.
    """
    if not torch.distributed.is_initialized():
        return
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check_checkpoint_path(path: str) -> None:
    """Refuse a checkpoint that does not exist; remote ones are left alone."""
    if is_remote(path) or osp.isfile(osp.expanduser(path)):
        return
    if osp.isdir(osp.expanduser(path)):
        fail(f'the checkpoint {path!r} is a folder; name a file in it.')
    fail(f'the checkpoint {path!r} does not exist.')


def check_checkpoint_sound(runner: Runner, path: str) -> None:
    """Refuse a checkpoint to start from that is damaged, not finite, or of another
    backbone.

    What else it lacks is left to the model: fine-tuning replaces heads.
    """
    model = _bare_model(runner)
    try:
        state = state_dict_of(read_checkpoint(path))
        check_finite(state)
        if model.state_dict().keys().isdisjoint(state):
            raise ValueError(
                f'none of its {len(state)} names, which begin with '
                f"{list(state)[:2]}, is one of the model's: convert or rename them"
            )
        for name, module in model.named_modules():
            if isinstance(module, MDEQ):
                # As the backbone itself does when it loads.
                adapt_channels(module, state, f'{name}.')
                check_state_dict(module, state, f'{name}.')
                check_no_more(module, state, f'{name}.')
    except (OSError, RuntimeError, ValueError) as error:
        fail(f'the checkpoint {path!r} cannot be used: {error}')


def check_checkpoint_fits(runner: Runner, path: str, resume: bool = False) -> None:
    """Refuse a checkpoint that does not hold the whole model, nor, to resume from,
    the state of a training.

    mmengine only logs what is missing or does not fit, and would go on with random
    weights.
    """
    try:
        checkpoint = read_checkpoint(path)
        check_state_dict(_bare_model(runner), state_dict_of(checkpoint), '')
        if resume:
            check_resumable(checkpoint)
    except (OSError, RuntimeError, ValueError) as error:
        fail(f'the checkpoint {path!r} cannot be used with this config: {error}')


def _bare_model(runner: Runner) -> torch.nn.Module:
    """The model without what distributes it, or augments its images."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
