"""What the Cityscapes configs say, without training them."""

import math
import re
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn
from torch.nn import functional as F

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
BASES = CONFIGS / '_base_'
LEAVES = sorted(path.name for path in (CONFIGS / 'cityscapes').glob('*.py'))
TOOLBOX = Path(mmseg.__file__).parent / '.mim' / 'configs'

SMALL = 'fcn_mdeq-small{}_4xb3-124k_cityscapes-512x1024.py'
LARGE = 'fcn_mdeq-large{}_4xb3-124k_cityscapes-512x1024.py'
XL = 'fcn_mdeq-xl{}_8xb2-93k_cityscapes-768x1024.py'
BESIDE = '_4xb3-124k_cityscapes-512x1024.py'

# What docs/choosing.md recommends.
RECOMMENDED = dict(
    solver=dict(type='AndersonSolver', max_steps=5, tol=1e-3, memory=5),
    eval_solver=dict(type='AndersonSolver', max_steps=12, tol=1e-3, memory=5),
    gradient=dict(type='PhantomGradient', steps=3, unroll=True),
)

# Published settings of the official models: GPUs, batch; unrolled layers and
# iterations; limits of Broyden's method; weight decay; crop; dropout; channels; all
# parameters, with a bias before the norm of the head that ours does not have.
OFFICIAL = {
    SMALL: (
        (4, 3), (3, 60000), (27, 30), 2e-4, (512, 1024), 0.05,
        (32, 64, 128, 256), 8_968_467,
    ),
    LARGE: (
        (4, 3), (3, 60000), (27, 30), 3e-4, (512, 1024), 0.03,
        (80, 160, 320, 640), 55_955_859,
    ),
    XL: (
        (8, 2), (3, 40000), (27, 30), 3e-4, (768, 1024), 0.04,
        (88, 176, 352, 704), 79_551_755,
    ),
}  # fmt: skip

# HRNet's, as published with its Cityscapes configurations.
CLASS_WEIGHTS = [
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
]  # fmt: skip

# Our base model, the toolbox's, and what its configs change in that.
RESNET101 = dict(pretrained='open-mmlab://resnet101_v1c', backbone=dict(depth=101))
BASELINES = {
    'fcn_hr18s': ('hrnet/fcn_hr18s_4xb2-40k_cityscapes-512x1024.py', {}),
    'fcn_hr18': ('_base_/models/fcn_hr18.py', {}),
    'fcn_hr48': ('hrnet/fcn_hr48_4xb2-40k_cityscapes-512x1024.py', {}),
    'fcn_r50-d8': ('_base_/models/fcn_r50-d8.py', {}),
    'fcn_r101-d8': ('_base_/models/fcn_r50-d8.py', RESNET101),
    'pspnet_r50-d8': ('_base_/models/pspnet_r50-d8.py', {}),
    'pspnet_r101-d8': ('_base_/models/pspnet_r50-d8.py', RESNET101),
    'deeplabv3plus_r50-d8': ('_base_/models/deeplabv3plus_r50-d8.py', {}),
    'deeplabv3plus_r101-d8': ('_base_/models/deeplabv3plus_r50-d8.py', RESNET101),
}


def read(name):
    return Config.fromfile(CONFIGS / 'cityscapes' / name)


def own(name):
    return Config.fromfile(BASES / name, import_custom_modules=False).to_dict()


def toolbox(name):
    path = TOOLBOX / name
    if not path.is_file():
        pytest.skip(f'mmseg was installed without its configs ({path} is not there)')
    return Config.fromfile(path)


def build(cfg, device='meta'):
    init_default_scope('mmseg')
    with torch.device(device):
        return MODELS.build(cfg.model)


def stages(cfg):
    return [cfg[f'{stage}_dataloader'].dataset for stage in ('train', 'val', 'test')]


@pytest.mark.parametrize('name', LEAVES)
def test_every_config_is_whole(name):
    """It parses, imports the plugin and holds what training and testing need."""
    cfg = read(name)
    assert cfg.default_scope == 'mmseg'
    assert cfg.custom_imports.imports == ['mdeq_mm']
    for dataset in stages(cfg):
        assert dataset.type == 'CityscapesDataset'
        assert dataset.data_root == 'data/cityscapes'
    hooks = cfg.default_hooks
    assert hooks.guard.type == 'CheckpointGuardHook'
    assert hooks.data.type == 'DataGuardHook'
    assert ('monitor' in hooks) == ('mdeq' in name)
    assert ('warmup' in hooks) == ('official' in name)

    # Every saved checkpoint was evaluated, and the last iteration is saved.
    saving = hooks.checkpoint
    assert (saving.by_epoch, saving.max_keep_ckpts, saving.save_best) == (
        False, 3, 'mIoU',
    )  # fmt: skip
    assert saving.interval == cfg.train_cfg.val_interval
    assert cfg.train_cfg.max_iters % saving.interval == 0

    # Batches in training are as large as the crops.
    crop = next(t for t in cfg.train_pipeline if t.type == 'RandomCrop').crop_size
    assert cfg.model.data_preprocessor.size == crop
    assert cfg.train_dataloader.dataset.pipeline == cfg.train_pipeline


@pytest.mark.parametrize('name', LEAVES)
def test_the_name_states_what_the_config_holds(name):
    cfg = read(name)
    stated = re.fullmatch(
        r'(fcn|pspnet|deeplabv3plus|upernet)_(mdeq|hr|r)-?(\w+?)(?:-d8)?(_official)?'
        r'_(\d)xb(\d)-(\d+)k_cityscapes-(\d+)x(\d+)\.py',
        name,
    )
    head, kind, size, official = stated.groups()[:4]
    gpus, batch, thousands, height, width = map(int, stated.groups()[4:])
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr.base_batch_size == gpus * batch
    assert cfg.train_cfg.max_iters == thousands * 1000
    assert cfg.model.data_preprocessor.size == (height, width)

    assert cfg.model.decode_head.type == dict(
        fcn='FCNHead',
        pspnet='PSPHead',
        deeplabv3plus='DepthwiseSeparableASPPHead',
        upernet='UPerHead',
    )[head]  # fmt: skip
    backbone = cfg.model.backbone
    assert backbone.type == dict(mdeq='MDEQ', hr='HRNet', r='ResNetV1c')[kind]
    if kind == 'mdeq':
        official_arch = dict(preset=size, injection='first')
        assert backbone.arch == (official_arch if official else size)
        assert backbone.get('out_norm_cfg', '') == (None if official else '')
        assert backbone.solver.get('norm', 'rel') == ('abs' if official else 'rel')
    elif kind == 'r':
        assert backbone.depth == int(size)
    else:
        assert backbone.extra.stage4.num_channels[0] == int(size.removesuffix('s'))


@pytest.mark.parametrize('name', LEAVES)
def test_the_schedule_is_of_500_epochs(name):
    cfg = read(name)
    batch = cfg.auto_scale_lr.base_batch_size
    iterations = 500 * math.ceil(2975 / batch)
    assert cfg.train_cfg.max_iters == iterations
    assert cfg.param_scheduler == dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=0,
        end=iterations,
        T_max=iterations,
        eta_min=1e-6,
    )


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_official_settings(name):
    batch, unroll, (forward, backward), decay, crop, dropout, channels, _ = OFFICIAL[
        name
    ]
    cfg = read(name.format('_official'))
    gpus, samples = batch
    assert cfg.train_dataloader.batch_size == samples
    assert cfg.auto_scale_lr.base_batch_size == gpus * samples
    assert cfg.train_pipeline[3].crop_size == crop

    warmup = cfg.default_hooks.warmup
    assert not warmup.get('by_epoch', False) and isinstance(warmup.end, float)
    iterations = round(warmup.end * cfg.train_cfg.max_iters)
    assert (warmup.unroll_steps, iterations) == unroll

    backbone = cfg.model.backbone
    assert backbone.drop_rate == dropout
    assert backbone.solver == dict(
        type='BroydenSolver', max_steps=forward + 1, tol=1e-3, norm='abs'
    )
    assert backbone.gradient == dict(
        type='ImplicitGradient',
        solver=dict(type='BroydenSolver', max_steps=backward + 1, tol=1e-3),
    )
    head = cfg.model.decode_head
    for part in (backbone, head):
        assert part.norm_cfg == dict(type='SyncBN', momentum=0.01, requires_grad=True)
    assert tuple(head.in_channels) == channels and head.channels == sum(channels)
    assert head.align_corners and head.dropout_ratio == 0
    assert 'auxiliary_head' not in cfg.model

    optim = cfg.optim_wrapper.optimizer
    assert optim == dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=decay)


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_defaults_differ_from_the_official_ones_in_what_was_measured_alone(name):
    default, official = read(name.format('')), read(name.format('_official'))
    assert official.model.backbone.pop('eval_solver') is None
    found = {k: default.model.backbone.pop(k) for k in RECOMMENDED}
    assert found == RECOMMENDED
    for key in ('solver', 'gradient'):
        assert official.model.backbone.pop(key) != found[key]
    # The image in every branch, norms over the batch, a cold start.
    assert official.model.backbone.pop('out_norm_cfg') is None
    for cfg in (default, official):
        cfg.model.backbone.pop('arch')
        cfg.pop('norm_cfg')
        # Statistics of the official norms move ten times more slowly.
        for part in (cfg.model.backbone, cfg.model.decode_head):
            expected = 0.01 if cfg is official else None
            assert part.norm_cfg.pop('momentum', None) == expected
        path = cfg.model.backbone.init_cfg.pop('checkpoint')
        assert ('_official_' in path) == (cfg is official)
    assert official.default_hooks.pop('warmup')
    assert default.to_dict() == official.to_dict()


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_parameters_are_the_official_ones(name):
    """But for the bias that the norm after it takes away again."""
    *_, channels, parameters = OFFICIAL[name]
    model = build(read(name.format('_official')))
    expected = parameters - sum(channels)
    assert sum(p.numel() for p in model.parameters()) == expected
    # A 1x1 convolution and a norm into each branch but the first.
    expected += (channels[0] + 2) * sum(channels[1:])
    model = build(read(name.format('')))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize('head', ['pspnet', 'deeplabv3plus', 'upernet'])
def test_other_heads_stand_on_the_same_backbone(head):
    fcn, other = read(SMALL.format('')).to_dict(), read(f'{head}_mdeq-small{BESIDE}')
    other = other.to_dict()
    fcn['model'].pop('decode_head')
    other['model'].pop('decode_head')
    assert fcn == other


@pytest.mark.parametrize('baseline', sorted(BASELINES))
def test_baselines_differ_in_the_model_alone(baseline):
    """Same data, schedule and runtime; MDEQ is watched."""
    mdeq, peer = read(SMALL.format('')), read(baseline + BESIDE)
    size = mdeq.model.data_preprocessor.size
    assert peer.model.data_preprocessor.size == size
    mdeq, peer = mdeq.to_dict(), peer.to_dict()
    for cfg in (mdeq, peer):
        for key in ('model', 'norm_cfg'):
            assert cfg.pop(key)
    assert mdeq['default_hooks'].pop('monitor')
    for key in ('val_evaluator', 'test_evaluator'):
        *found, metric = mdeq.pop(key)
        assert found == [peer.pop(key)]
        assert metric == dict(type='EquilibriumMetric')
    assert mdeq['optim_wrapper'].pop('type') == 'EquilibriumOptimWrapper'
    peer['optim_wrapper'].pop('type', None)
    assert mdeq.pop('tta_model') == dict(type='ImplicitSegTTAModel')
    assert peer.pop('tta_model') == dict(type='SegTTAModel')
    assert mdeq == peer


@pytest.mark.parametrize('baseline', sorted(BASELINES))
def test_baselines_are_those_of_the_toolbox(baseline):
    """But for the loss, and the key that names the pretrained file."""
    name, changes = BASELINES[baseline]
    theirs = toolbox(name)
    theirs.merge_from_dict(dict(model=changes))
    theirs, ours = theirs.to_dict()['model'], own(f'models/{baseline}.py')['model']
    assert ours['backbone'].pop('init_cfg') == dict(
        type='Pretrained', checkpoint=theirs.pop('pretrained')
    )
    assert ours['decode_head'].pop('loss_decode')['class_weight'] == CLASS_WEIGHTS
    assert theirs['decode_head'].pop('loss_decode') == dict(
        type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0
    )
    theirs['data_preprocessor'].pop('size', None)
    assert ours == theirs


def test_data_are_read_as_by_the_toolbox():
    ours, theirs = (
        own('datasets/cityscapes.py'),
        toolbox('_base_/datasets/cityscapes.py'),
    )
    theirs = theirs.to_dict()
    for stage in ('train', 'val', 'test'):
        for cfg in (ours, theirs):
            # Where the data lie, and how fast they are read, is no part of it.
            cfg[f'{stage}_dataloader'].pop('num_workers')
            root = cfg[f'{stage}_dataloader']['dataset'].pop('data_root')
            assert root.rstrip('/') == 'data/cityscapes'
    assert ours['train_dataloader'].pop('batch_size') == 3
    assert theirs['train_dataloader'].pop('batch_size') == 2
    assert ours.pop('data_root') and theirs.pop('data_root')
    assert ours == theirs


def test_crops_of_the_largest_model_differ_in_their_size_alone():
    ours = own('datasets/cityscapes_768x1024.py')
    usual = own('datasets/cityscapes.py')
    assert ours['train_dataloader'].pop('batch_size') == 2
    assert usual['train_dataloader'].pop('batch_size') == 3
    for cfg, size in ((ours, (768, 1024)), (usual, (512, 1024))):
        assert cfg.pop('crop_size') == size
        cfg.pop('train_pipeline')
        crop = cfg['train_dataloader']['dataset']['pipeline'][3]
        assert crop == dict(type='RandomCrop', crop_size=size, cat_max_ratio=0.75)
        crop.pop('crop_size')
    assert ours == usual


def test_runtime_is_that_of_the_toolbox():
    ours = own('default_runtime_seg.py')
    theirs = toolbox('_base_/default_runtime.py').to_dict()
    hooks = toolbox('_base_/schedules/schedule_80k.py').default_hooks.to_dict()
    hooks['checkpoint'].pop('interval')
    assert ours.pop('custom_imports')
    # mmengine's default, written out as in the runtime for classification.
    assert ours.pop('randomness') == dict(seed=None, deterministic=False)
    for added in ('guard', 'data', 'failure', 'exact_resume', 'caption'):
        assert ours['default_hooks'].pop(added)
    assert ours.pop('default_hooks') == hooks
    assert ours == theirs


@pytest.mark.parametrize('official', ['', '_official'])
@pytest.mark.parametrize('size', ['small', 'large', 'xl'])
def test_training_starts_from_the_last_checkpoint_of_the_imagenet_config(
    size, official
):
    name = {'small': SMALL, 'large': LARGE, 'xl': XL}[size].format(official)
    backbone = read(name).model.backbone
    init = backbone.init_cfg
    work_dir, config, checkpoint = Path(init.checkpoint).parts
    assert (work_dir, init.type, init.prefix) == (
        'work_dirs',
        'Pretrained',
        'backbone.',
    )
    imagenet = Config.fromfile(CONFIGS / 'imagenet' / f'{config}.py')
    assert imagenet.model.backbone.arch == backbone.arch
    assert checkpoint == f'epoch_{imagenet.train_cfg.max_epochs}.pth'


@pytest.mark.parametrize('name', LEAVES)
def test_one_key_names_the_pretrained_file(name):
    """And None in its place starts from random weights, in every config."""
    cfg = read(name)
    assert 'pretrained' not in cfg.model
    cfg.merge_from_dict({'model.backbone.init_cfg.checkpoint': 'absent.pth'})
    model = build(cfg)
    assert model.backbone.init_cfg['checkpoint'] == 'absent.pth'
    cfg.merge_from_dict({'model.backbone.init_cfg': None})
    inits = build(cfg).backbone.init_cfg or []
    assert all(init['type'] != 'Pretrained' for init in inits)


@pytest.mark.parametrize('name', LEAVES)
def test_the_loss_is_pytorchs_weighted_cross_entropy(name):
    """Per pixel, ignored ones left out, over the weights of the labels that remain."""
    init_default_scope('mmseg')
    criterion = MODELS.build(read(name).model.decode_head.loss_decode)
    scores = torch.randn(2, 19, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 19, (2, 5, 7))
    labels[0, :3] = 255
    labels[1, 4, 6] = 255

    loss = criterion(scores, labels, weight=None, ignore_index=255)
    weight = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(scores, labels, weight=weight, ignore_index=255)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(loss, scores)
    (wanted,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert criterion.loss_name == 'loss_ce'


def test_the_head_starts_as_the_official_one():
    cfg = read(SMALL.format(''))
    cfg.model.backbone.init_cfg = None
    model = build(cfg, 'cpu')
    model.init_weights()
    conv, classifier = model.decode_head.convs[0].conv, model.decode_head.conv_seg
    assert conv.weight.shape == (480, 480, 1, 1) and conv.bias is None
    assert classifier.weight.shape == (19, 480, 1, 1)
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not classifier.bias.any()
    norm = model.decode_head.convs[0].bn
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    assert model.decode_head.dropout is None


@pytest.mark.parametrize(
    ('official', 'expected', 'outputs'),
    # Two in the stem, four in the injection or one, one in the head; and those of the
    # outputs, which are local anywhere.
    [('', [0.1] * 7, [0.1] * 4), ('_official', [0.01] * 4, [])],
)
def test_one_process_turns_batch_norms_local_and_keeps_their_momentum(
    official, expected, outputs
):
    """mmengine does this by itself wherever a training has one process."""
    model = build(read(SMALL.format(official)))
    synced = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert [m.momentum for m in synced] == expected
    model = revert_sync_batchnorm(model)
    local = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert [m.momentum for m in local] == expected + outputs
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def test_the_readme_lists_every_config_with_its_parameters():
    text = (CONFIGS / 'cityscapes' / 'README.md').read_text()
    rows = re.findall(r'^\| \[[^]]+\]\((.+?)\) \| [^|]+ \| ([\d.]+) \|', text, re.M)
    assert sorted(name for name, _ in rows) == [
        n for n in LEAVES if 'official' not in n
    ]
    for name, millions in rows:
        parameters = sum(p.numel() for p in build(read(name)).parameters())
        assert millions == f'{parameters / 1e6:.1f}', name


def test_options_that_the_readme_names_are_there():
    text = (CONFIGS / 'cityscapes' / 'README.md').read_text()
    keys = set(re.findall(r'(?<=[ `])([\w.]+\.\w+)=', text))
    assert len(keys) == 7
    cfg = read(SMALL.format(''))
    for key in keys:
        *parents, name = key.split('.')
        owner = cfg
        for parent in parents:
            owner = owner[parent]
        # What only other modes and settings of a part have.
        if name not in ('crop_size', 'stride', 'decode'):
            assert name in owner, key
    assert HOOKS.build({**cfg.default_hooks.data, 'decode': False}).decode is False
