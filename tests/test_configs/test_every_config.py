"""Every config trains for two iterations and evaluates, on tiny data.

The first iteration is unrolled and the second solves, where a config has the hook for
it. Otherwise nothing is changed but what a command line would: folders, the number of
iterations, workers, and sizes of images and batches.
"""

import math
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from yapf.yapflib import yapf_api

from mdeq_mm.implicit.layer import equilibrium_layers
from tests.short_trainings import shorten, write_data_sets

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
PATHS = sorted(p for p in CONFIGS.glob('*/*.py') if p.parent.name != '_base_')

# A few of each kind, of the quick ones, are always run.
FAST = (
    'cifar10/resnet50_2xb64-50e_cifar10',
    'cifar10/mdeq-tiny_official_2xb64-50e_cifar10',
    'camvid/fcn_mdeq_short_1xb4-1400it_camvid-180x240',
    'demo/mdeq_jacobian_1xb64-30e_digits',
    'demo/hrnet_1xb16-12e_digit-scenes-64x64',
    'imagenet/resnet50_8xb32-100e_in1k',
)
CASES = [
    pytest.param(path, id=name, marks=() if name in FAST else pytest.mark.slow)
    for path in PATHS
    for name in [f'{path.parent.name}/{path.stem}']
]


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    """Folders of tiny data sets, by where configs expect the real ones."""
    return write_data_sets(tmp_path_factory.mktemp('data'))


def shortened(path, roots, work_dir):
    cfg = Config.fromfile(path)
    shorten(cfg, roots)
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
        warmup = runner.cfg.default_hooks.get('warmup')
        first, second = witness.evaluations[:: len(witness.evaluations) // 2]
        solver = equilibrium_layers(runner.model)[0].solver
        assert 1 <= second <= solver.max_steps
        if warmup is None:
            assert 1 <= first <= solver.max_steps
        else:
            assert first == warmup.unroll_steps != second
        # Per cent.
        assert 0 <= named['converged'] <= 100 and named['residual'] > 0
    shutil.rmtree(tmp_path / 'out')
