"""The CamVid configs: what they say, and that they train, evaluate and are tested."""

import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from yapf.yapflib import yapf_api

from tests.helpers import load_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs/camvid'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))
FULL = [name for name in NAMES if 'short' not in name]
SHORT = [name for name in NAMES if 'short' in name]
(SHORT_MDEQ,) = (name for name in SHORT if 'mdeq' in name)

COLORS = dict(
    Sky=[128, 128, 128],
    Building=[128, 0, 0],
    Pole=[192, 192, 128],
    Road=[128, 64, 128],
    Pavement=[0, 0, 192],
    Tree=[128, 128, 0],
    SignSymbol=[192, 128, 128],
    Fence=[64, 64, 128],
    Car=[64, 0, 128],
    Pedestrian=[64, 64, 0],
    Bicyclist=[0, 128, 192],
)
PARAMETERS = {
    'fcn_mdeq-small': 8_979_371,
    'fcn_hr18s': 3_937_141,
    'fcn_mdeq_short': 4_172_747,
    'fcn_hr18s_short': 3_937_141,
}
SMALL = (48, 36)


def read(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


@pytest.mark.parametrize('name', NAMES)
def test_data_and_classes(name):
    cfg = read(name)
    for stage in ('train', 'val', 'test'):
        dataset = cfg[f'{stage}_dataloader'].dataset
        assert dataset.metainfo.classes == tuple(COLORS)
        assert dataset.metainfo.palette == list(COLORS.values())
        assert dataset.data_prefix == dict(
            img_path=f'images/{stage}', seg_map_path=f'annotations/{stage}'
        )
    colors = load_tool('tools/dataset_converters/camvid.py').CLASSES
    assert {name: list(color) for name, color in colors.items()} == COLORS
    for head in ('decode_head', 'auxiliary_head'):
        if head in cfg.model:
            assert cfg.model[head].num_classes == len(COLORS)
            loss = cfg.model[head].loss_decode
            assert loss == dict(type='CrossEntropyLoss', avg_non_ignore=True)
    height, width = re.search(r'_camvid-(\d+)x(\d+)', name).groups()
    for stage in ('val', 'test'):
        resize, labels = cfg[f'{stage}_dataloader'].dataset.pipeline[1:3]
        assert resize.scale == (int(width), int(height))
        # After the resizing: compared at full size.
        assert labels.type == 'LoadAnnotations'
    crop = cfg.train_dataloader.dataset.pipeline[3]
    assert crop.crop_size == cfg.model.data_preprocessor.size


@pytest.mark.parametrize('name', NAMES)
def test_the_name_states_batch_and_schedule(name):
    cfg = read(name)
    batch, number, unit = re.search(r'_1xb(\d+)-(\d+)(it|k)_', name).groups()
    iterations = int(number) * dict(it=1, k=1000)[unit]
    assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.auto_scale_lr.base_batch_size == int(batch)
    assert cfg.train_cfg.max_iters == iterations
    warmup, cosine = cfg.param_scheduler
    assert warmup.type == 'LinearLR' and warmup.end == cosine.begin
    assert cosine.type == 'CosineAnnealingLR' and cosine.end == iterations
    assert cosine.T_max == iterations - cosine.begin
    interval = cfg.train_cfg.val_interval
    assert iterations % interval == 0
    assert cfg.default_hooks.checkpoint.interval == interval
    assert cfg.default_hooks.checkpoint.save_best == 'mIoU'
    # What each model was measured to learn best with.
    lr = 3e-3 if name == SHORT_MDEQ else 1e-3
    optimizer = dict(type='AdamW', lr=lr, weight_decay=0.01)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert 'warmup' not in cfg.default_hooks


@pytest.mark.parametrize('names', [FULL, SHORT], ids=['full', 'short'])
def test_models_are_all_that_differs(names):
    """Same data, schedule and runtime, but for the learning rate; MDEQ is watched."""

    def rest(name):
        cfg = read(name).to_dict()
        assert cfg.pop('model')
        # What a base of the model happens to leave behind.
        for key in ('norm_cfg', 'class_weight', 'data_preprocessor'):
            cfg.pop(key, None)
        assert ('mdeq' in name) == bool(cfg['default_hooks'].pop('monitor', None))
        if 'mdeq' in name:
            for key in ('val_evaluator', 'test_evaluator'):
                cfg[key], metric = cfg[key]
                assert metric == dict(type='EquilibriumMetric')
        assert cfg.pop('tta_model')['type'].startswith('Implicit') == ('mdeq' in name)
        kind = cfg['optim_wrapper'].pop('type')
        assert kind.startswith('Equilibrium') == ('mdeq' in name)
        cfg['optim_wrapper']['optimizer'].pop('lr')
        return cfg

    first, *others = map(rest, names)
    assert others
    for other in others:
        assert other == first


@pytest.mark.parametrize('name', NAMES)
def test_models_start_from_scratch(name):
    cfg = read(name)
    assert cfg.model.backbone.init_cfg is None and cfg.load_from is None
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    family = name.split('_1x')[0]
    if family in PARAMETERS:
        number = sum(p.numel() for p in model.parameters())
        assert number == PARAMETERS[family]


def write_camvid(root, number=2, size=SMALL):
    """Write images of two flat classes, whose upper half is sky, and their labels."""
    width, height = size
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for i in range(number):
            labels = np.full((height, width), 3 + i, np.uint8)
            labels[: height // 2] = 0
            labels[-2:] = 255
            image = rng.integers(0, 40, (height, width, 3)) + 50 * (
                labels[..., None] % 5
            )
            for kind, suffix, array in (
                ('images', 'jpg', image.astype(np.uint8)),
                ('annotations', 'png', labels),
            ):
                path = root / kind / split / f'Seq_f{i:03d}.{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path), array)
    return root


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the main function of tools/train.py or tools/test.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    # Set by the tools themselves; taken back after the test.
    monkeypatch.setenv('LOCAL_RANK', '0')
    # mmengine prints a config several times a run, and lays it out anew each time,
    # which takes longer than the run.
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **style: (text, True))

    def run(tool, *args):
        monkeypatch.setattr(sys, 'argv', [f'tools/{tool}.py', *map(str, args)])
        # Python's own standard library has a package called test.
        monkeypatch.delitem(sys.modules, tool, raising=False)
        import_module(tool).main()

    return run


def test_the_short_config_trains_evaluates_and_draws(call, tmp_path, capfd):
    """With the options that its comment names, an eighth of the width, tiny images."""
    data = write_camvid(tmp_path / 'camvid')
    config = CONFIGS / f'{SHORT_MDEQ}.py'
    options = [
        'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
        'param_scheduler.0.end=1', 'param_scheduler.1.begin=1',
        'param_scheduler.1.T_max=1', 'param_scheduler.1.end=2',
        'default_hooks.checkpoint.interval=2',
        'default_hooks.monitor.interval=1', 'default_hooks.logger.interval=1',
        # Groups of two channels, because the last branch is left with one pixel.
        'model.backbone.arch.channels=(8,8,8,8)', 'model.backbone.arch.num_groups=4',
        'model.decode_head.channels=32',
        'model.decode_head.in_channels=(8,8,8,8)',
        'model.data_preprocessor.size=(32,32)',
        'train_dataloader.dataset.pipeline.2.scale=(48,36)',
        'train_dataloader.dataset.pipeline.3.crop_size=(32,32)',
        'val_dataloader.dataset.pipeline.1.scale=(48,36)',
        'test_dataloader.dataset.pipeline.1.scale=(48,36)',
        *(f'tta_pipeline.1.transforms.0.{i}.scale_factor=1.0' for i in range(3)),
    ]  # fmt: skip
    out = tmp_path / 'out'
    common = ['--data-root', data, '--cfg-options', *options]
    call('train', config, '--work-dir', out, *common, f'visualizer.name={out}/train')
    (path,) = out.glob('*/vis_data/scalars.json')
    first, second, evaluated = map(json.loads, path.read_text().splitlines())
    assert math.isfinite(first['loss']) and math.isfinite(second['loss'])
    # Cold from the first iteration on.
    limit = Config.fromfile(config).model.backbone.solver.max_steps
    assert all(1 < record['eq_steps'] <= limit for record in (first, second))
    assert 0 <= evaluated['mIoU'] <= 100
    assert (out / 'best_mIoU_iter_2.pth').is_file()

    capfd.readouterr()
    shown = tmp_path / 'shown'
    call('test', config, out / 'iter_2.pth', '--work-dir', tmp_path / 'tested',
         '--show-dir', shown, *common, f'visualizer.name={out}/test')  # fmt: skip
    printed = ''.join(capfd.readouterr())
    # IoUMetric's table of the classes, in their order.
    rows = re.findall(r'^\|\s+(\w+)\s+\|\s+[\d.nan]+\s+\|', printed, re.M)
    assert rows == list(COLORS)
    # Truth and prediction side by side. The lower left is road, or pavement.
    (picture,) = shown.rglob('*Seq_f000*.png')
    drawn = cv2.imread(str(picture))[..., ::-1]
    # Below it a line about the equilibrium.
    assert drawn.shape[0] > SMALL[1] and drawn.shape[1:] == (2 * SMALL[0], 3)
    drawn = drawn[: SMALL[1]]
    image = cv2.imread(str(data / 'images/test/Seq_f000.jpg'))[..., ::-1]
    blended = 0.2 * image[30, 40] + 0.8 * np.array(COLORS['Road'])
    np.testing.assert_allclose(drawn[30, 40], blended, atol=1.01)

    call('test', config, out / 'iter_2.pth', '--work-dir', tmp_path / 'augmented',
         '--tta', *common, f'visualizer.name={out}/tta')  # fmt: skip
    (metrics,) = (tmp_path / 'augmented').glob('*/*.json')
    assert 0 <= json.loads(metrics.read_text())['mIoU'] <= 100
