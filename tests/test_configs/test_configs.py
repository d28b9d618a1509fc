"""What the configs say, without running them."""

import re
from pathlib import Path

import mmpretrain
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
BASES = CONFIGS / '_base_'
FAMILIES = ('imagenet', 'cifar10')
LEAVES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for family in FAMILIES
    for path in (CONFIGS / family).glob('*.py')
)
# The others are of other scopes, and have tests of their own.
MODEL_BASES = sorted(
    path.stem
    for path in (BASES / 'models').glob('*.py')
    if re.search(r"type='(Implicit)?ImageClassifier'", path.read_text())
)
TOOLBOX = Path(mmpretrain.__file__).parent / '.mim' / 'configs' / '_base_'

# Parameters of the whole models: the official ones, injections of the other branches
# (on CIFAR-10 with two branches, of all), and the norm of the pooled features.
PARAMETERS = dict(
    mdeq_small=16_808_936 + (32 + 2) * (64 + 128 + 256) + 2 * 2048,
    mdeq_large=67_063_624 + (80 + 2) * (160 + 320 + 640) + 2 * 2048,
    mdeq_xl=90_463_280 + (88 + 2) * (176 + 352 + 704) + 2 * 2048,
    mdeq_tiny_cifar=158_890 + (24 + 2) * (24 + 24) + 2 * 200,
    mdeq_large_cifar=11_097_438 + (32 + 2) * (64 + 128 + 256) + 2 * 1680,
    mdeq_mini_cifar=162_106,
)

# What docs/choosing.md recommends.
RECOMMENDED = dict(
    solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
    eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
    gradient=dict(type='PhantomGradient', steps=3, unroll=True),
)

# Config of each official model, and its published settings: GPUs, batch, epochs;
# unrolled layers, iterations, and iterations of an epoch; limits of Broyden's method,
# norm; optimiser, learning rate, weight decay; dropout.
# MDEQ-XL's are published as 510,000, of 500,500: here they are the share of the others.
OFFICIAL = {
    'imagenet/mdeq-small{}_4xb32-100e_in1k.py': (
        (4, 32, 100), (5, 510000, 10010), (26, 27, 'abs'), ('SGD', 0.05, 5e-5), None,
    ),
    'imagenet/mdeq-large{}_4xb32-100e_in1k.py': (
        (4, 32, 100), (4, 510000, 10010), (26, 27, 'abs'), ('SGD', 0.05, 1e-4), None,
    ),
    'imagenet/mdeq-xl{}_8xb32-100e_in1k.py': (
        (8, 32, 100), (4, 255000, 5005), (26, 27, 'abs'), ('SGD', 0.05, 1e-4), None,
    ),
    'cifar10/mdeq-tiny{}_2xb64-50e_cifar10.py': (
        (2, 64, 50), (10, 3000, 391), (18, 20, 'rel'), ('Adam', 1e-3, 2.5e-6), 0.25,
    ),
    'cifar10/mdeq-large{}_4xb32-220e_cifar10.py': (
        (4, 32, 220), (10, 20000, 391), (18, 20, 'rel'), ('Adam', 1e-3, 0.0), 0.3,
    ),
}  # fmt: skip

# The MDEQ configs, and how the names of the baselines beside them end.
BESIDE = {
    'imagenet/mdeq-small_4xb32-100e_in1k.py': '_4xb32-100e_in1k.py',
    'imagenet/mdeq-large_4xb32-100e_in1k.py': '_4xb32-100e-wd1e-4_in1k.py',
    'imagenet/mdeq-xl_8xb32-100e_in1k.py': '_8xb32-100e_in1k.py',
    'cifar10/mdeq-tiny_2xb64-50e_cifar10.py': '_2xb64-50e_cifar10.py',
    'cifar10/mdeq-large_4xb32-220e_cifar10.py': '_4xb32-220e_cifar10.py',
}
BASELINES = ('resnet50', 'resnet101', 'hrnet-w18', 'hrnet-w32')


def read(name):
    return Config.fromfile(CONFIGS / name)


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def toolbox(name):
    if not TOOLBOX.is_dir():
        pytest.skip('mmpretrain was installed without its configs')
    return Config.fromfile(TOOLBOX / name).to_dict()


def own(name):
    return Config.fromfile(BASES / name, import_custom_modules=False).to_dict()


@pytest.mark.parametrize('name', LEAVES)
def test_every_config_is_whole(name):
    """It parses, imports the plugin and holds what training and testing need."""
    cfg = read(name)
    assert cfg.custom_imports.imports == ['mdeq_mm']
    for stage in ('train', 'val', 'test'):
        assert cfg[f'{stage}_dataloader'] and cfg[f'{stage}_cfg'] is not None
    assert cfg.default_hooks.guard.type == 'CheckpointGuardHook'
    assert ('monitor' in cfg.default_hooks) == ('mdeq' in name)
    # All but the shortest recipe and the official ones start cold.
    unrolled = 'official' in name or 'mdeq-mini' in name
    assert ('warmup' in cfg.default_hooks) == unrolled


@pytest.mark.parametrize('name', LEAVES)
def test_the_name_states_batch_and_schedule(name):
    cfg = read(name)
    stated = re.search(r'_(\d+)xb(\d+)(?:-(\d+)e)?', name)
    gpus, batch, epochs = (g and int(g) for g in stated.groups())
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr.base_batch_size == gpus * batch
    if epochs is None:
        return
    assert cfg.train_cfg.max_epochs == epochs
    if '-mini' in name:
        # Constant after the first epoch, and a straight line from the twelfth on.
        first, schedule = cfg.param_scheduler
        assert (first.type, first.begin, first.end) == ('LinearLR', 0, 1)
        assert (schedule.type, schedule.end_factor) == ('LinearLR', 1e-3)
        assert (schedule.begin, schedule.end) == (12, epochs)
        assert schedule.convert_to_iter_based and schedule.by_epoch
        return
    schedule = cfg.param_scheduler
    assert schedule.type == 'CosineAnnealingLR'
    assert schedule.convert_to_iter_based and schedule.by_epoch
    assert schedule.T_max == schedule.end == epochs
    assert schedule.eta_min == 1e-6


@pytest.mark.parametrize('name', MODEL_BASES)
def test_every_base_model_builds(name):
    cfg = Config.fromfile(BASES / 'default_runtime.py')
    cfg.merge_from_dict(Config.fromfile(BASES / 'models' / f'{name}.py').to_dict())
    # Those of other projects read numbers of what they build.
    with torch.device('meta' if name in PARAMETERS else 'cpu'):
        model = build(cfg)
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_official_settings(name):
    batch, unroll, limits, (optimizer, lr, decay), dropout = OFFICIAL[name]
    forward, backward, norm = limits
    cfg = read(name.format('_official'))
    gpus, samples, _ = batch
    assert cfg.auto_scale_lr.base_batch_size == gpus * samples
    assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_epochs) == batch[1:]

    warmup = cfg.default_hooks.warmup
    steps, iterations, epoch = unroll
    assert warmup.unroll_steps == steps and not warmup.get('by_epoch', False)
    assert isinstance(warmup.end, float)
    assert round(warmup.end * cfg.train_cfg.max_epochs * epoch) == iterations

    backbone = cfg.model.backbone
    size = read(name.format('')).model.backbone.arch
    assert backbone.arch == dict(preset=size, injection='first')
    assert backbone.out_norm_cfg is None and backbone.get('drop_rate') == dropout
    assert backbone.init_cfg == [
        dict(type='Normal', layer='Conv2d', std=0.01),
        dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1, bias=0),
    ]
    assert backbone.solver == dict(
        type='BroydenSolver', max_steps=forward + 1, tol=1e-3, norm=norm
    )
    assert backbone.gradient == dict(
        type='ImplicitGradient',
        solver=dict(type='BroydenSolver', max_steps=backward + 1, tol=1e-3),
    )

    optim = cfg.optim_wrapper.optimizer
    assert (optim.type, optim.lr, optim.weight_decay) == (optimizer, lr, decay)
    if optimizer == 'SGD':
        assert optim.momentum == 0.9 and optim.nesterov


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_defaults_differ_from_the_official_ones_in_what_was_measured_alone(name):
    default, official = read(name.format('')), read(name.format('_official'))
    assert official.model.backbone.pop('eval_solver') is None
    found = {k: default.model.backbone.pop(k) for k in RECOMMENDED}
    assert found == RECOMMENDED
    for key in ('solver', 'gradient'):
        assert official.model.backbone.pop(key) != found[key]
    # The image in every branch, norms over the batch, a cold start.
    for key in ('out_norm_cfg', 'init_cfg', 'drop_rate'):
        assert key not in default.model.backbone
        official.model.backbone.pop(key, None)
    for cfg in (default, official):
        cfg.model.backbone.pop('arch')
    assert official.default_hooks.pop('warmup')
    assert official.model.neck[1] == dict(type='GlobalAveragePooling')
    width = official.model.neck[0].out_channels
    assert default.model.neck[1] == dict(type='MDEQPoolBranches', in_channels=width)
    official.model.neck[1] = default.model.neck[1]
    assert default.to_dict() == official.to_dict()


@pytest.mark.parametrize('baseline', BASELINES)
@pytest.mark.parametrize('name', sorted(BESIDE))
def test_baselines_differ_in_the_model_alone(name, baseline):
    """Same data, schedule and runtime; MDEQ is watched."""
    mdeq = read(name).to_dict()
    peer = read(f'{Path(name).parent}/{baseline}{BESIDE[name]}').to_dict()
    for cfg in (mdeq, peer):
        assert cfg.pop('model')
    assert mdeq['default_hooks'].pop('monitor')
    for key in ('val_evaluator', 'test_evaluator'):
        *found, metric = mdeq.pop(key)
        assert found == [peer.pop(key)]
        assert metric == dict(type='EquilibriumMetric')
    assert mdeq['optim_wrapper'].pop('type') == 'EquilibriumOptimWrapper'
    peer['optim_wrapper'].pop('type', None)
    assert mdeq == peer


def test_runtime_is_that_of_the_toolbox():
    ours, theirs = own('default_runtime.py'), toolbox('default_runtime.py')
    assert ours.pop('custom_imports')
    for hook in ('guard', 'failure', 'exact_resume', 'caption', 'data'):
        assert ours['default_hooks'].pop(hook)
    assert ours == theirs


def test_imagenet_pipeline_is_that_of_the_toolbox():
    name = 'datasets/imagenet_bs32.py'
    assert own(name) == toolbox(name)


def test_cifar10_pipeline_is_that_of_the_toolbox():
    """Up to the images being files, which are loaded, and loaded as BGR."""
    ours = own('datasets/cifar10_bs32.py')
    theirs = toolbox('datasets/cifar10_bs16.py')
    assert ours['data_preprocessor'].pop('to_rgb')
    assert not theirs['data_preprocessor'].pop('to_rgb')
    assert ours['data_preprocessor'] == theirs['data_preprocessor']
    for pipeline in ('train_pipeline', 'test_pipeline'):
        assert ours[pipeline][0] == dict(type='LoadImageFromFile')
        assert ours[pipeline][1:] == theirs[pipeline]
    assert ours['val_evaluator'] == theirs['val_evaluator']


@pytest.mark.parametrize(
    ('name', 'toolbox_name'),
    [
        ('resnet50', 'resnet50'),
        ('resnet101', 'resnet101'),
        ('resnet50_cifar', 'resnet50_cifar'),
        ('resnet101_cifar', 'resnet101_cifar'),
        ('hrnet-w18', 'hrnet/hrnet-w18'),
        ('hrnet-w32', 'hrnet/hrnet-w32'),
    ],
)
def test_baselines_are_those_of_the_toolbox(name, toolbox_name):
    ours = own(f'models/{name}.py')['model']
    theirs = toolbox(f'models/{toolbox_name}.py')['model']
    if 'topk' not in theirs['head']:
        assert ours['head'].pop('topk') == (1,)
    assert ours == theirs
