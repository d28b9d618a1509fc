"""tools/dist_train.sh with two processes, broken off and resumed."""

import json
import sys
from importlib import import_module

import pytest
import torch
from mmengine.config import Config

from tests.helpers import ROOT
from tests.image_folders import CIFAR10, write_class_folder
from tests.test_tools.test_shell import TINY, free_port, run


def trained(tmp_path, name, *args):
    """Two epochs on five images, with an evaluation on three after each."""
    work_dir = tmp_path / name
    result = run(
        'dist_train.sh', TINY, 2, '--data-root', tmp_path / 'data', '--work-dir',
        work_dir, *args, '--cfg-options', 'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0',
        'test_dataloader.num_workers=0', 'train_cfg.max_epochs=2',
        'default_hooks.logger.interval=1',
        'default_hooks.exact_resume.type=ExactResumeHook', 'randomness.seed=1',
        cwd=tmp_path, PORT=str(free_port()), CUDA_VISIBLE_DEVICES='-1',
        OMP_NUM_THREADS='1',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    state = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    return state, records


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_training_of_two_processes_ends_like_an_unbroken_one(tmp_path):
    write_class_folder(tmp_path / 'data', CIFAR10, dict(train=5, test=3), 32)
    whole, records = trained(tmp_path, 'whole')
    losses = [r['loss'] for r in records if 'loss' in r]
    accuracies = [r['accuracy/top1'] for r in records if 'accuracy/top1' in r]
    # Three images a process, in batches of two.
    assert len(losses) == 4 and len(accuracies) == 2
    # Of three images, and not of the four that fill both processes.
    for accuracy in accuracies:
        assert accuracy * 3 / 100 == pytest.approx(round(accuracy * 3 / 100), abs=1e-4)

    first = tmp_path / 'whole' / 'epoch_1.pth'
    resumed, records = trained(tmp_path, 'resumed', '--resume', first)
    assert [r['loss'] for r in records if 'loss' in r] == losses[2:]
    assert [r['accuracy/top1'] for r in records if 'accuracy/top1' in r][-1:] == (
        accuracies[1:]
    )
    assert resumed['meta']['iter'] == whole['meta']['iter'] == 4
    for key, weight in whole['state_dict'].items():
        assert torch.equal(resumed['state_dict'][key], weight), key


def test_sync_bn_becomes_bn(monkeypatch):
    """Both ways to ask for it, where processes run on CPUs."""
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    tools = import_module('common')
    cfg = Config.fromfile(TINY)
    assert tools.replace_sync_bn(cfg) == 0
    cfg.sync_bn = 'torch'
    cfg.model.backbone.norm_cfg = dict(type='SyncBN', eps=1e-3)
    assert tools.replace_sync_bn(cfg) == 2
    assert cfg.get('sync_bn') is None
    assert cfg.model.backbone.norm_cfg == dict(type='BN', eps=1e-3)
