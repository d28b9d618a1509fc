"""Misspelt settings are named with their place, value and what may have been meant."""

import subprocess
import sys

import pytest
import torch
from mmengine.registry import (
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    init_default_scope,
)

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

from mdeq_mm import get_config
from tests.helpers import load_tool


@pytest.fixture(scope='module')
def tool():
    return load_tool('tools/misspelt.py')


def wrapper(cfg):
    model = torch.nn.Linear(1, 1)
    cfg.optim_wrapper.optimizer.pop('type')
    optimizer = torch.optim.AdamW(model.parameters(), **cfg.optim_wrapper.optimizer)
    OPTIM_WRAPPERS.build(dict(cfg.optim_wrapper, optimizer=optimizer))


BUILD = {
    'model': lambda cfg: MODELS.build(cfg.model),
    'train_cfg': lambda cfg: LOOPS.build(
        dict(
            type='EpochBasedTrainLoop',
            runner=None,
            dataloader={},
            max_epoch=cfg.train_cfg.max_epoch,
        )
    ),
    'default_hooks': lambda cfg: HOOKS.build(cfg.default_hooks.monitor),
    'val_evaluator': lambda cfg: METRICS.build(cfg.val_evaluator[0]),
    'optim_wrapper': wrapper,
    'train_dataloader': lambda cfg: torch.utils.data.DataLoader([], batchsize=3),
}


@pytest.mark.parametrize(
    ('option', 'value', 'said'),
    [
        ('model.bakbone', 2, "ImplicitImageClassifier has no setting 'bakbone'; did "
         "you mean 'backbone'?"),
        ('model.head.num_clases', 3, "LinearClsHead has no setting 'num_clases'; did "
         "you mean 'num_classes'?"),
        ('train_cfg.max_epoch', 5, "EpochBasedTrainLoop has no setting 'max_epoch'; "
         "did you mean 'max_epochs'?"),
        ('default_hooks.monitor.intervl', 5, 'EquilibriumMonitorHook has no setting '
         "'intervl'; did you mean 'interval'?"),
        # A key that is right elsewhere in the config; what the class inherits is known.
        ('val_evaluator.0.priority', 'LOW', "Accuracy has no setting 'priority'; use "
         'one of topk, thrs, collect_device, prefix'),
        ('optim_wrapper.optimizer.lrr', 0.1, "AdamW has no setting 'lrr'; did you mean "
         "'lr'?"),
        ('train_dataloader.batchsize', 3, "DataLoader has no setting 'batchsize'; did "
         "you mean 'batch_size'?"),
    ],
)  # fmt: skip
def test_what_is_said(tool, option, value, said):
    cfg = get_config('mdeq-digits')
    cfg.default_hooks.logger.priority = 'LOW'
    init_default_scope('mmpretrain')
    cfg.merge_from_dict({option: value})
    with pytest.raises(TypeError) as error:
        BUILD[option.split('.')[0]](cfg)
    found = tool.unknown_setting(error.value, cfg)
    assert found.startswith(f'{option}={value!r}: {said}')


def test_other_errors_are_left_alone(tool):
    cfg = get_config('mdeq-digits')
    assert tool.unknown_setting(TypeError('something else'), cfg) is None
    # A call within the model is no setting.
    error = TypeError("Stem.__init__() got an unexpected keyword argument 'nowhere'")
    assert tool.unknown_setting(error, cfg) is None


def test_checkpoints_fail_before_the_training(repo_root, tmp_path):
    """mmengine passes the setting on, and stops at the first checkpoint."""
    command = [
        sys.executable, 'tools/train.py', 'mdeq-digits', '--work-dir', str(tmp_path),
        '--data-root', str(tmp_path), '--cfg-options',
        'default_hooks.checkpoint.intervall=2',
    ]  # fmt: skip
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'train.py: error: the config cannot be used: default_hooks.checkpoint.'
        "intervall=2: CheckpointHook has no setting 'intervall'; did you mean "
        "'interval'?"
    )
