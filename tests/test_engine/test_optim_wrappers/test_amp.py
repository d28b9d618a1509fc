"""The twin in mixed precision: with a loss scaler on a CPU, and on a GPU."""

import pytest
import torch
from mmengine.optim import AmpOptimWrapper
from torch import nn

from mdeq_mm.engine.optim_wrappers import (
    AmpEquilibriumOptimWrapper,
    EquilibriumFailure,
)
from mdeq_mm.engine.optim_wrappers.mixed_precision import MixedPrecision
from tests.helpers import logged

from .conftest import forward_status, gradient, image, training

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason='needs a GPU')


def amp(folder, fault, at, **options):
    options = dict(dtype='bfloat16') | options
    return training(
        folder,
        fault,
        at,
        type='AmpEquilibriumOptimWrapper',
        clip_grad=dict(max_norm=1.0),
        **options,
    )


@pytest.mark.skipif(GPU, reason='for machines without a GPU')
def test_takes_a_cpu():
    """Which the parent refuses."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(AssertionError):
        AmpOptimWrapper(optimizer=optimizer)
    wrapper = AmpEquilibriumOptimWrapper(optimizer=optimizer)
    model = nn.Linear(1, 1)
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 1)).dtype == torch.bfloat16
    assert wrapper.loss_scaler.get_scale() == 2.0**16
    assert wrapper.loss_scaler.state_dict()['growth_interval'] == 2000


def test_a_fixed_scale_stays():
    model = Weight(loss_scale=32)
    handle = model.weight.register_hook(lambda grad: grad * float('inf'))
    assert model.step(1.0) == (1.0, 32.0)
    handle.remove()
    assert model.step(1.0) == (0.5, 32.0)


@pytest.mark.parametrize(
    ('options', 'error', 'said'),
    [
        (dict(dtype='float64'), ValueError, r"dtype='float64' is no reduced precision"),
        (dict(use_fsdp=True), ValueError, r'use_fsdp=True.*MMDistributedDataParallel'),
        (dict(loss_scale=True), TypeError, r'loss_scale must be.*True'),
        (dict(loss_scale='static'), TypeError, r"loss_scale must be.*'static'"),
        pytest.param(
            dict(dtype=torch.float16), ValueError, r'float16 needs a GPU',
            marks=pytest.mark.skipif(GPU, reason='for machines without a GPU'),
        ),
    ],
)  # fmt: skip
def test_refuses(options, error, said):
    with pytest.raises(error, match=said):
        Weight(**options)


class Weight:
    """A wrapped weight of 1, and steps on w * factor."""

    def __init__(self, **options):
        self.weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([self.weight], lr=0.5)
        self.wrapper = AmpEquilibriumOptimWrapper(optimizer=optimizer, **options)

    def step(self, factor):
        loss = (self.weight * factor).sum()
        self.wrapper.update_params(loss)
        return self.weight.item(), self.wrapper.loss_scaler.get_scale()


def test_overflow_is_the_scalers_business():
    model = Weight(loss_scale=dict(init_scale=2.0**120), policy='stop')
    assert model.step(0.5) == (0.75, 2.0**120)
    # Finite, and no more once it is scaled.
    assert model.step(1e10) == (0.75, 2.0**119)
    assert model.wrapper.skipped == 0
    assert model.wrapper.inner_count == 2
    assert model.step(0.5) == (0.5, 2.0**119)


def test_a_loss_that_is_not_finite_is_none_of_the_scalers():
    model = Weight(loss_scale=dict(init_scale=1024.0), policy='warn')
    with logged() as texts:
        assert model.step(float('nan')) == (1.0, 1024.0)
    assert model.wrapper.skipped == 1
    assert 'non-finite loss' in texts[-1]
    assert model.step(1.0) == (0.5, 1024.0)


def test_overflow_without_a_scale_is_a_failure():
    for scale, skipped in ((2.0, 0), (1.0, 1)):
        model = Weight(loss_scale=dict(init_scale=scale), policy='warn')
        handle = model.weight.register_hook(lambda grad: grad * float('inf'))
        assert model.step(1.0)[0] == 1.0
        assert model.wrapper.skipped == skipped
        handle.remove()
        assert model.step(1.0)[0] == 0.5


def test_without_scaler():
    model = Weight(loss_scale=dict(enabled=False), policy='warn')
    handle = model.weight.register_hook(lambda grad: grad * float('inf'))
    assert model.step(1.0)[0] == 1.0
    assert model.wrapper.skipped == 1
    handle.remove()
    assert model.step(1.0)[0] == 0.5


@pytest.mark.parametrize('parents', [False, pytest.param(True, marks=needs_gpu)])
def test_checkpoints_are_those_of_the_parent(parents):
    model = Weight(loss_scale=dict(init_scale=64.0))
    cls = AmpOptimWrapper if parents else MixedPrecision
    parent = cls(optimizer=torch.optim.SGD([model.weight], lr=0.1))
    model.step(1.0)
    parent.load_state_dict(model.wrapper.state_dict())
    assert parent.loss_scaler.get_scale() == 64.0
    other = Weight()
    other.wrapper.load_state_dict(parent.state_dict())
    assert other.wrapper.loss_scaler.get_scale() == 64.0
    assert other.wrapper.get_lr()['lr'] == [0.5]


@pytest.mark.parametrize('policy', ['warn', 'skip', 'stop'])
def test_trainings_in_bfloat16(tmp_path, policy):
    """Policies act as without a scaler, which keeps its scale meanwhile."""
    if GPU:
        pytest.skip('autocast would be that of the GPU')
    check_policies(tmp_path, policy, 'bfloat16')


@needs_gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('policy', ['warn', 'skip', 'stop'])
def test_trainings_on_a_gpu(tmp_path, policy, dtype):
    check_policies(tmp_path, policy, dtype)


def check_policies(folder, policy, dtype):
    for name, fault in (('solve', forward_status()), ('image', image(float('nan')))):
        # Small enough that nothing overflows.
        runner, diary = amp(
            folder / name, fault, [2], policy=policy, dtype=dtype, loss_scale=8.0
        )
        if policy == 'stop':
            with pytest.raises(EquilibriumFailure):
                runner.train()
            assert diary.changed() == [0, 1]
        else:
            runner.train()
            kept = policy == 'warn' and name == 'solve'
            assert diary.changed() == ([0, 1, 2, 3, 4, 5] if kept else [0, 1, 3, 4, 5])
            assert diary.counts == [1, 2, 3, 4, 5, 6]
        assert all(v.isfinite().all() for s in diary.states for v in s.values())
        assert runner.optim_wrapper.loss_scaler.get_scale() == 8.0


def test_overflow_in_a_training(tmp_path):
    """Weights stay, the scale falls, and it is no failure."""
    if GPU:
        pytest.skip('autocast would be that of the GPU')
    runner, diary = amp(
        tmp_path,
        gradient(float('inf')),
        [2],
        policy='stop',
        loss_scale=dict(init_scale=8.0),
    )
    runner.train()
    # The batch's statistics remain, as with the parent.
    weights = [s['head.weight'] for s in diary.states]
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    assert runner.optim_wrapper.loss_scaler.get_scale() == 4.0
    assert runner.optim_wrapper.skipped == 0
