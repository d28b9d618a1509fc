"""MDEQ configs train, evaluate, save and resume on an image folder.

Nothing but ``data_root`` is overridden; a hook ends the run after one epoch. That all
configs train is in test_every_config.py.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mdeq_mm.checkpoints import read_checkpoint

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

CASES = [
    pytest.param('imagenet/mdeq-small_4xb32-100e_in1k.py', id='small'),
    pytest.param('cifar10/mdeq-tiny_2xb64-50e_cifar10.py', id='cifar-tiny'),
    pytest.param('cifar10/mdeq-tiny_official_2xb64-50e_cifar10.py', id='official'),
    pytest.param(
        'cifar10/mdeq-large_4xb32-220e_cifar10.py',
        id='cifar-large',
        marks=pytest.mark.slow,
    ),
]


class Witness(Hook):
    """Ends training after an epoch, and keeps what the test asks about."""

    def __init__(self):
        self.first_iter = None
        self.losses = []
        self.evaluations = []
        self.metrics = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.first_iter is None:
            self.first_iter = runner.iter
            self.start = {
                k: v.detach().cpu().clone()
                for k, v in runner.model.state_dict().items()
            }
            self.momentum = bool(runner.optim_wrapper.optimizer.state)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())
        steps = runner.model.backbone.last_solution.steps
        self.evaluations.append(steps.float().mean().item())

    def after_train_epoch(self, runner):
        runner.train_loop.stop_training = True

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics


def train(config, data_root, work_dir, options):
    cfg = Config.fromfile(CONFIGS / config)
    for stage in ('train', 'val', 'test'):
        cfg[f'{stage}_dataloader'].dataset.data_root = str(data_root)
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(options)
    witness = Witness()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(witness)
    runner.train()
    return runner, witness


@pytest.fixture
def work_dir(tmp_path):
    """A folder that is removed at once: checkpoints of large models fill disks."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize('config', CASES)
def test_train_evaluate_save_resume(config, request, work_dir):
    """One epoch, of the official models unrolled, then a resumed one."""
    folder = 'imagenet_folder' if config.startswith('imagenet') else 'cifar10_folder'
    data_root = request.getfixturevalue(folder)

    runner, first = train(config, data_root, work_dir, {})
    warmup = runner.cfg.default_hooks.get('warmup')
    limit = runner.cfg.model.backbone.solver.max_steps
    assert (first.first_iter, first.momentum) == (0, False)
    if warmup is not None:
        assert first.evaluations == [warmup.unroll_steps]
    else:
        assert len(first.evaluations) == 1 < first.evaluations[0] <= limit
    assert math.isfinite(first.losses[0])
    assert 0 <= first.metrics['accuracy/top1'] <= 100
    saved = read_checkpoint(str(work_dir / 'epoch_1.pth'))
    assert saved['meta']['epoch'] == 1

    options = {'resume': True}
    if warmup is not None:
        options['default_hooks.warmup.end'] = 1
    runner, second = train(config, data_root, work_dir, options)
    assert (second.first_iter, second.momentum) == (1, True)
    for name, value in saved['state_dict'].items():
        torch.testing.assert_close(second.start[name], value, rtol=0, atol=0)
    assert 1 < second.evaluations[0] <= limit
    if warmup is not None:
        assert second.evaluations[0] != warmup.unroll_steps
    assert math.isfinite(second.losses[0])
    assert (work_dir / 'epoch_2.pth').is_file()


def test_short_cifar10_config(cifar10_folder, tmp_path):
    """Four iterations of four images, with the options that its comment names."""
    options = {
        'train_cfg.max_iters': 4,
        'train_cfg.val_interval': 4,
        'param_scheduler.T_max': 4,
        'train_dataloader.batch_size': 4,
    }
    config = 'cifar10/mdeq-tiny_short_1xb64_cifar10.py'
    cfg = Config.fromfile(CONFIGS / config)
    assert 'warmup' not in cfg.default_hooks
    assert cfg.param_scheduler.T_max == cfg.train_cfg.max_iters
    assert cfg.train_cfg.val_interval == cfg.train_cfg.max_iters

    runner, witness = train(config, cifar10_folder, tmp_path, options)
    assert len(witness.evaluations) == 4
    assert all(1 < steps <= 5 for steps in witness.evaluations)
    assert all(map(math.isfinite, witness.losses))
    assert witness.metrics is not None
    assert (tmp_path / 'iter_4.pth').is_file()
    # The last of four iterations is three quarters down the cosine.
    last_lr = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * 3 / 4)) / 2
    assert runner.optim_wrapper.get_lr()['lr'][0] == pytest.approx(last_lr)
