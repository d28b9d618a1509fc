"""Every config trains for two iterations and evaluates, on tiny data.

The first iteration is unrolled and the second solves, where a config has the hook for
it. Otherwise nothing is changed but what a command line would: folders, the number of
iterations, workers, and sizes of images and batches.
"""

import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from yapf.yapflib import yapf_api

from mdeq_mm.implicit.layer import equilibrium_layers
from tests.cityscapes_folder import write_cityscapes
from tests.image_folders import write_class_folder

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
PATHS = sorted(p for p in CONFIGS.glob('*/*.py') if p.parent.name != '_base_')

# A few of each kind, of the quick ones, are always run.
FAST = (
    'cifar10/resnet50_2xb64-50e_cifar10',
    'cifar10/mdeq-tiny_official_2xb64-50e_cifar10',
    'camvid/fcn_mdeq_short_1xb4-2800it_camvid-180x240',
    'demo/mdeq_jacobian_1xb64-30e_digits',
    'demo/hrnet_1xb16-12e_digit-scenes-64x64',
    'imagenet/resnet50_8xb32-100e_in1k',
)
CASES = [
    pytest.param(path, id=name, marks=() if name in FAST else pytest.mark.slow)
    for path in PATHS
    for name in [f'{path.parent.name}/{path.stem}']
]

# Sides of images and crops, of which the larger ones take a CPU too long.
SMALLER = {
    224: 64,
    256: 72,
    (2048, 1024): (128, 64),
    (512, 1024): (32, 64),
    (768, 1024): (48, 64),
    (480, 360): (120, 90),
    (360, 480): (80, 112),
}
SIZES = ('scale', 'crop_size', 'size')


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    """Folders of tiny data sets, by where configs expect the real ones."""
    root = tmp_path_factory.mktemp('data')
    classes = [f'n{i:08d}' for i in range(1000)]
    write_class_folder(root / 'imagenet', classes, dict(train=4, val=2), size=72)
    names = [str(i) for i in range(10)]
    for name, split in (('cifar10', 'test'), ('digits', 'test')):
        splits = {'train': 4, split: 2}
        classes = names
        if name == 'cifar10':
            classes = 'airplane automobile bird cat deer dog frog horse ship truck'
            classes = classes.split()
        write_class_folder(root / name, classes, splits, size=32)
    write_cityscapes(root / 'cityscapes', dict(train=4, val=1))
    rng = np.random.default_rng(0)
    for name, size, suffix in (
        ('camvid', (90, 120), 'jpg'),
        ('digit_scenes', (64, 64), 'png'),
    ):
        for split, number in (('train', 4), ('val', 1), ('test', 1)):
            for i in range(number):
                labels = rng.integers(0, 11, size, np.uint8)
                write(root / name / 'annotations' / split / f'{i}.png', labels)
                image = np.stack([labels * 20] * 3, axis=2)
                write(root / name / 'images' / split / f'{i}.{suffix}', image)
    return root


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def shrink(node, roots):
    """Replace folders and sizes, wherever they stand in a config."""
    if isinstance(node, list | tuple):
        for part in node:
            shrink(part, roots)
        return
    if not isinstance(node, dict):
        return
    if str(node.get('data_root', '')).startswith('data/'):
        node['data_root'] = str(roots / Path(node['data_root']).name)
    for key, value in node.items():
        small = SMALLER.get(tuple(value) if isinstance(value, list) else value) if (
            key in SIZES and isinstance(value, int | list | tuple)
        ) else None  # fmt: skip
        if small is not None:
            node[key] = small
        else:
            shrink(value, roots)


def shortened(path, roots, work_dir):
    cfg = Config.fromfile(path)
    for field in ('train_dataloader', 'val_dataloader', 'model', 'data_preprocessor'):
        shrink(cfg.get(field), roots)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
    if cfg.train_cfg.get('by_epoch') or 'max_epochs' in cfg.train_cfg:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
    else:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    if 'warmup' in cfg.default_hooks:
        cfg.default_hooks.warmup.update(by_epoch=False, end=1)
    if 'jacobian' in cfg.default_hooks:
        cfg.default_hooks.jacobian.update(frequency=1.0)
    if cfg.model.backbone.get('init_cfg') is not None:
        cfg.model.backbone.init_cfg = None
    if 'pretrained' in cfg.model:
        cfg.model.pretrained = None
    # Only for the sake of the disk.
    cfg.default_hooks.checkpoint.save_last = False
    cfg.default_hooks.checkpoint.interval = 1000
    cfg.default_hooks.checkpoint.pop('save_best', None)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = cfg.visualizer.name = f'every-{path.parent.name}-{path.stem}'
    return cfg


class Witness(Hook):
    """Keeps losses, evaluations of f, and results."""

    def __init__(self):
        self.losses, self.evaluations, self.metrics = [], [], {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs['loss']))
        for layer in equilibrium_layers(runner.model):
            self.evaluations.append(layer.last_solution.steps.float().mean().item())

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics


@pytest.mark.parametrize('path', CASES)
def test_two_iterations_and_an_evaluation(path, roots, tmp_path, monkeypatch):
    # mmengine lays out a config anew each time it prints it, which takes long.
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **style: (text, True))
    runner = Runner.from_cfg(shortened(path, roots, tmp_path / 'out'))
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    witness = Witness()
    runner.register_hook(witness)
    runner.train()
    assert len(witness.losses) == 2 and all(map(math.isfinite, witness.losses))
    named = {name.rpartition('/')[2]: v for name, v in witness.metrics.items()}
    scores = [v for name, v in named.items() if name in ('top1', 'mIoU')]
    assert scores and all(0 <= score <= 100 for score in scores)
    moved = [
        name
        for name, p in runner.model.named_parameters()
        if not p.equal(before[name].to(p.device))
    ]
    assert len(moved) > 0.8 * len(list(runner.model.parameters()))
    if 'mdeq' in path.stem:
        warmup = runner.cfg.default_hooks.warmup
        first, second = witness.evaluations[:: len(witness.evaluations) // 2]
        assert first == warmup.unroll_steps
        solver = equilibrium_layers(runner.model)[0].solver
        assert 1 <= second <= solver.max_steps and second != first
        # Per cent.
        assert 0 <= named['converged'] <= 100 and named['residual'] > 0
    shutil.rmtree(tmp_path / 'out')
