"""Weights that are spread over processes are refused, and why is said."""

import sys
from importlib import import_module

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mdeq_mm.engine import UnrollWarmupHook
from mdeq_mm.engine.hooks.layers import required_layers
from tests.helpers import ROOT
from tests.test_engine.test_hooks.conftest import make_runner  # noqa: F401

TINY = ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'


class Sharded(FullyShardedDataParallel):
    """What a wrapper looks like from outside, without processes to shard over."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.inner = module

    def __getattr__(self, name):
        return nn.Module.__getattr__(self, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize('whole', [True, False])
def test_at_run_time(make_runner, whole):  # noqa: F811
    runner = make_runner([UnrollWarmupHook(2, 1)])
    if whole:
        runner.model = Sharded(runner.model)
    else:
        runner.model.backbone.stem = Sharded(runner.model.backbone.stem)
    with pytest.raises(TypeError) as error:
        runner.call_hook('before_train')
    said = str(error.value)
    assert 'model_wrapper_cfg.type' in said and 'shards the weights' in said
    assert 'needs all at every evaluation of f' in said
    assert 'MMDistributedDataParallel' in said and '90 million' in said


@pytest.mark.filterwarnings('ignore:FSDP is switching to use:UserWarning')
def test_a_model_of_pytorchs_own_wrapper(make_runner, tmp_path):  # noqa: F811
    """The real one, in a group of one process."""
    runner = make_runner()
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        runner.model = FullyShardedDataParallel(
            runner.model, device_id=torch.device('cpu')
        )
        with pytest.raises(TypeError, match='shards the weights'):
            required_layers(runner, UnrollWarmupHook(2, 1))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def tools(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(sys, 'argv', ['tools/train.py'])
    return import_module('common')


@pytest.mark.parametrize(
    ('field', 'name'),
    [
        ('model_wrapper_cfg', 'MMFullyShardedDataParallel'),
        ('strategy', 'FSDPStrategy'),
        ('strategy', 'DeepSpeedStrategy'),
        ('strategy', 'ColossalAIStrategy'),
    ],
)
def test_by_config(tools, field, name):
    cfg = Config.fromfile(TINY)
    cfg[field] = dict(type=name)
    with pytest.raises(SystemExit) as stop:
        tools.build_runner(cfg)
    said = stop.value.code
    assert said.startswith(f"train.py: error: {field}.type='{name}' shards")
    assert 'MMDistributedDataParallel' in said and '90 million' in said
    assert '\n' not in said


def test_other_wrappers_and_models_are_left_alone(tools):
    cfg = Config.fromfile(TINY)
    tools.check_not_sharded(cfg)
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel')
    tools.check_not_sharded(cfg)
    peer = Config.fromfile(ROOT / 'configs/cifar10/resnet50_2xb64-50e_cifar10.py')
    peer.model_wrapper_cfg = dict(type='MMFullyShardedDataParallel')
    tools.check_not_sharded(peer)


def test_the_largest_model_has_90_million_parameters():
    """What the sentences say; neck and head have more."""
    from mdeq_mm.models import MDEQ

    with torch.device('meta'):
        sizes = [p.numel() for p in MDEQ('xl').parameters()]
    assert 60e6 < sum(sizes) < 90.5e6
