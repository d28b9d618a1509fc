"""Reduced precision, scaled losses, accumulated and clipped gradients."""

import json
import sys
from functools import partial
from importlib import import_module

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch.nn.utils import clip_grad_norm_

from mdeq_mm.engine.optim_wrappers import (
    AmpEquilibriumOptimWrapper,
    EquilibriumOptimWrapper,
)
from mdeq_mm.implicit import Status
from tests.helpers import ROOT, cosine, relative
from tests.image_folders import CIFAR10, write_class_folder
from tests.test_distributed.models import (
    ADJOINT,
    GRADIENTS,
    batches,
    class_batch,
    class_samples,
    classifier,
    contractive_weights,
    freeze_norms,
    train,
)

TINY = ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=needs_gpu)]

# Other solvers than those that the gradients have by default here.
CASES = GRADIENTS | {
    'recomputed': GRADIENTS['implicit'] | dict(with_cp=True),
    'picard': dict(
        solver=dict(type='PicardSolver', max_steps=20, tol=1e-3),
        gradient=dict(type='ImplicitGradient', solver=dict(ADJOINT, max_steps=30)),
    ),
    'broyden, anderson': dict(
        solver=dict(type='BroydenSolver', max_steps=15, tol=1e-3, memory=5),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='AndersonSolver', max_steps=15, tol=1e-4),
        ),
    ),
}


@pytest.fixture(scope='module')
def weights():
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    return contractive_weights()


@pytest.fixture
def model_of(weights):
    def make(name='implicit', device='cpu', dtype=torch.float32):
        model = classifier(**CASES[name]).to(device, dtype)
        model.backbone.load_state_dict(weights)
        model.train()
        freeze_norms(model)
        return model

    return make


def gradients(model, dtype=None, scale=1.0, device='cpu'):
    """Gradients of the scaled loss of four images, under autocast to a type."""
    images, labels = next(batches(dtype=torch.float32))
    with torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(images.to(device), class_samples(labels), mode='loss')
    # As the scaler does: outside of autocast.
    (losses['loss'] * scale).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', CASES)
def test_bfloat16_is_close_to_float32(model_of, name, device):
    """bfloat16 has 8 bits: cosines of .9975 to 1.0000 were seen."""
    expected = gradients(model_of(name, device), device=device)
    model = model_of(name, device)
    found = gradients(model, torch.bfloat16, device=device)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)
    assert cosine(found, expected) > 0.99
    assert relative(found, expected) < 0.1
    assert model.backbone.last_solution.value.dtype == torch.float32
    assert model.backbone.last_solution.residual.max() < 0.1


@needs_gpu
@pytest.mark.parametrize('name', CASES)
def test_float16_is_close_to_float32(model_of, name):
    expected = gradients(model_of(name, 'cuda'), device='cuda')
    found = gradients(model_of(name, 'cuda'), torch.float16, 2.0**12, 'cuda')
    found = [g / 2.0**12 for g in found]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)
    assert cosine(found, expected) > 0.995


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('name', CASES)
def test_a_scaled_loss_gives_the_same_gradient(model_of, name, dtype, device):
    """Bit for bit: the solve sees a unit vector, and the rest is linear in the scale.

    Powers of two change exponents alone, which bfloat16 and float32 have equally
    many of.
    """
    expected = gradients(model_of(name, device), dtype, device=device)
    assert any(g.abs().max() > 1e-4 for g in expected)
    # Squares of the last would be no float32 numbers any more.
    for scale in (2.0**16, 2.0**24, 2.0**100)[dtype is not None :]:
        found = gradients(model_of(name, device), dtype, scale, device)
        for one, other in zip(found, expected, strict=True):
            if device == 'cpu':
                assert torch.equal(one / scale, other)
            else:
                # Some kernels add up in no fixed order.
                torch.testing.assert_close(one / scale, other, rtol=1e-3, atol=1e-7)


@needs_gpu
@pytest.mark.parametrize('name', CASES)
def test_a_scaled_loss_in_float16(model_of, name):
    """To the precision of float16, 5e-4, which an unscaled gradient may fall below."""
    expected = gradients(model_of(name, 'cuda'), torch.float16, 2.0**8, 'cuda')
    found = gradients(model_of(name, 'cuda'), torch.float16, 2.0**12, 'cuda')
    assert cosine(found, expected) > 0.9999
    assert relative([g / 2.0**4 for g in found], expected) < 1e-2


@pytest.mark.parametrize('name', ['implicit', 'phantom series', 'shared inverse',
                                  'shared inverse, fallback'])  # fmt: skip
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_the_backward_solve_of_the_largest_gradient(model_of, name, dtype):
    """An incoming gradient next to the largest number: its norm is none any more."""
    images, _ = next(batches(dtype=torch.float32))
    found = []
    for size in (1.0, 2.0**127):
        model = model_of(name)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype is not None):
            maps = model.backbone(images)
        generator = torch.Generator().manual_seed(0)
        incoming = [torch.rand(m.shape, generator=generator) for m in maps]
        torch.autograd.backward(maps, [size * g for g in incoming])
        solution = model.backbone.last_solution.adjoint
        assert solution.value.isfinite().all()
        assert not (solution.status == Status.DIVERGED).any()
        found.append(solution)
    one, other = found
    assert one.steps.tolist() == other.steps.tolist()
    torch.testing.assert_close(one.value, other.value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.residual, other.residual, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('name', GRADIENTS)
def test_overflow_behind_the_backbone_is_seen(model_of, name):
    """By a loss scaler, which looks for weights whose gradient is not finite.

    In float16, where it overflows; elsewhere the sample is left out, and no more.
    """
    images, _ = next(batches(dtype=torch.float32))
    for dtype, seen in ((torch.float16, True), (torch.bfloat16, False)):
        model = model_of(name)
        with torch.autocast('cpu', dtype):
            maps = model.backbone(images)
        incoming = [torch.ones_like(m) for m in maps]
        incoming[0][1, 0, 0, 0] = torch.inf
        torch.autograd.backward(maps, incoming)
        f = model.backbone.equilibrium.f
        assert all(p.grad.isfinite().all() for p in f.parameters()) != seen


# Accumulation and clipping


WRAPPERS = [OptimWrapper, EquilibriumOptimWrapper]


def stepped(model, data, wrapper=OptimWrapper, **options):
    return train(model, data, partial(wrapper, **options))['weights']


@pytest.mark.parametrize(
    ('name', 'wrapper'),
    [
        # All but the warm start, where halves begin with the adjoints of each other.
        *((name, OptimWrapper) for name in GRADIENTS if name != 'implicit, warm'),
        ('implicit', EquilibriumOptimWrapper),
    ],
)
def test_accumulation_equals_the_whole_batch(model_of, name, wrapper):
    """Halves of three batches, in double precision."""
    whole = list(batches(3))
    halves = [tuple(part[i : i + 2] for part in b) for b in whole for i in (0, 2)]
    expected = stepped(
        model_of(name, dtype=torch.float64), (class_batch(*b) for b in whole)
    )

    def accumulating(optimizer):
        made = wrapper(optimizer=optimizer, accumulative_counts=2)
        made.initialize_count_status(model, 0, len(halves))
        return made

    model = model_of(name, dtype=torch.float64)
    found = train(model, (class_batch(*b) for b in halves), accumulating)['weights']
    for key, weight in expected.items():
        assert relative(found[key], weight) < 1e-12, key


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_clipping_equals_that_by_hand(model_of, wrapper):
    limit = 0.05
    found = stepped(
        model_of(dtype=torch.float64),
        (class_batch(*b) for b in batches(4)),
        wrapper,
        clip_grad=dict(max_norm=limit),
    )
    model = model_of(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in batches(4):
        optimizer.zero_grad()
        model(images, class_samples(labels), mode='loss')['loss'].backward()
        assert clip_grad_norm_(model.parameters(), limit) > limit
        optimizer.step()
    for key, weight in model.named_parameters():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize('scale', [2.0**16, 2.0**24])
def test_clipping_is_that_of_the_unscaled_gradient(model_of, scale):
    """bfloat16 on a CPU, with a scaler and without one."""
    if torch.cuda.is_available():
        pytest.skip('autocast would be that of the GPU')

    def steps(**options):
        model = model_of()
        return stepped(
            model,
            (class_batch(*b) for b in batches(3, dtype=torch.float32)),
            AmpEquilibriumOptimWrapper,
            clip_grad=dict(max_norm=0.05),
            **options,
        )

    expected = steps(loss_scale=dict(enabled=False))
    found = steps(loss_scale=scale)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


# tools/train.py --amp


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('cifar10')
    return write_class_folder(root, CIFAR10, dict(train=6, test=2), size=16)


@pytest.fixture
def train_tool(monkeypatch, tmp_path, data_root):
    """Call tools/train.py --amp on six images of 16 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.setenv('LOCAL_RANK', '0')

    def run(*args, epochs=1, **options):
        work_dir = tmp_path / 'work'
        options = {
            'train_dataloader.num_workers': 0,
            'train_dataloader.batch_size': 2,
            'train_cfg.max_epochs': epochs,
            'default_hooks.logger.interval': 1,
            'randomness.seed': 0,
        } | options
        monkeypatch.setattr(sys, 'argv', [
            'tools/train.py', str(TINY), '--amp', '--no-validate', '--data-root',
            str(data_root), '--work-dir', str(work_dir), *args, '--cfg-options',
            *(f'{k}={v}' for k, v in options.items()),
        ])  # fmt: skip
        monkeypatch.delitem(sys.modules, 'train', raising=False)
        import_module('train').main()
        state = torch.load(work_dir / f'epoch_{epochs}.pth', weights_only=False)
        (path,) = [*work_dir.glob('*/vis_data/scalars.json')][-1:]
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return state, [r['loss'] for r in records if 'loss' in r]

    return run


@pytest.mark.parametrize('wrapper', ['EquilibriumOptimWrapper', 'OptimWrapper'])
def test_amp_on_a_cpu(train_tool, wrapper):
    """bfloat16 with a dynamic scale, which a resumed training goes on with."""
    if torch.cuda.is_available():
        pytest.skip('it would train on the GPU')
    options = {'optim_wrapper.type': wrapper}
    state, losses = train_tool(**options)
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    scaler = state['optimizer']['loss_scaler']
    assert scaler['scale'] == 2.0**16
    assert scaler['_growth_tracker'] == 3
    weights = state['state_dict'].values()
    assert all(w.dtype != torch.bfloat16 and w.isfinite().all() for w in weights)

    # As after an overflow: a scale that no new training begins with.
    scaler.update(scale=2.0**10, _growth_tracker=7)
    torch.save(state, 'changed.pth')
    state, _ = train_tool('--resume', 'changed.pth', epochs=2, **options)
    scaler = state['optimizer']['loss_scaler']
    assert scaler['scale'] == 2.0**10
    assert scaler['_growth_tracker'] == 10
