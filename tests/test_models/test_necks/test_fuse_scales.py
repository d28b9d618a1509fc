import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d

from mdeq_mm.analysis.saved_bytes import saved_bytes
from mdeq_mm.models import MDEQFuseScales
from mdeq_mm.registry import MODELS
from tests.helpers import (
    build,
    logits_of,
    needs_shared,
    official_classifier,
    official_golden,
    relative,
)


def maps_of(channels, size, n=2, dtype=torch.float64):
    height, width = size
    maps = []
    for c in channels:
        maps.append(torch.randn(n, c, height, width, dtype=dtype))
        height, width = (height + 1) // 2, (width + 1) // 2
    return tuple(maps)


def reference(state, maps, training):
    """The official head's fusion as formulas over a state dict."""

    def norm(x, name):
        mean, var = state[name + '.running_mean'], state[name + '.running_var']
        weight, bias = state.get(name + '.weight'), state.get(name + '.bias')
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    def conv(x, name, **options):
        weight = state[name + '.weight']
        return conv2d(
            x,
            weight,
            state.get(name + '.bias'),
            padding=weight.shape[2] // 2,
            **options,
        )

    def bottleneck(x, i):
        name = f'bottlenecks.{i}.'
        h = x
        for k in range(3):
            layer = f'{name}layers.{k}.'
            h = norm(conv(h, layer + 'conv'), layer + 'bn')
            h = h.relu() if k < 2 else h
        if name + 'shortcut.conv.weight' in state:
            x = norm(conv(x, name + 'shortcut.conv'), name + 'shortcut.bn')
        return (h + x).relu()

    y = bottleneck(maps[0], 0)
    for i, x in enumerate(maps[1:]):
        name = f'downsamples.{i}.'
        down = norm(conv(y, name + 'conv', stride=2), name + 'bn').relu()
        y = bottleneck(x, i + 1) + down
    return norm(conv(y, 'final.conv'), 'final.bn').relu()


@pytest.mark.parametrize(
    ('inside', 'heads', 'size', 'expansion'),
    [
        ((8, 16, 32), (2, 4, 8), (8, 12), 4),
        # The first and the last have as many channels as the bottleneck's output:
        # their shortcut is the identity.
        ((8, 16, 32), (2, 3, 8), (8, 8), 4),
        ((4, 4), (3, 5), (7, 5), 2),
        ((6,), (2,), (4, 4), 3),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_against_formulas(inside, heads, size, expansion, training):
    neck = MDEQFuseScales(inside, heads, 10, expansion).double().train(training)
    with torch.no_grad():
        for tensor in neck.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    state = {k: v.clone() for k, v in neck.state_dict().items()}
    maps = maps_of(inside, size)
    (found,) = neck(maps)
    assert relative(found, reference(state, maps, training)) < 1e-12


def test_shapes():
    neck = MDEQFuseScales((8, 16, 32, 64), (4, 8, 16, 32), 100)
    out = neck(maps_of((8, 16, 32, 64), (13, 8), dtype=torch.float32))
    assert isinstance(out, tuple)
    assert [tuple(m.shape) for m in out] == [(2, 100, 2, 1)]


def test_count_of_parameters_by_hand():
    neck = MDEQFuseScales((8, 16), (2, 3), 10)
    # 1x1, 3x3, 1x1, and a shortcut with its norm where 8 = 4*2 does not hold.
    first = 8 * 2 + 9 * 2 * 2 + 2 * 8
    second = 16 * 3 + 9 * 3 * 3 + 3 * 12 + (16 * 12 + 2 * 12)
    down = 9 * 8 * 12 + 12 + 2 * 12
    final = 12 * 10 + 10 + 2 * 10
    assert sum(p.numel() for p in neck.parameters()) == first + second + down + final


def test_inner_norms_have_no_affine_parameters():
    neck = MDEQFuseScales((8, 16), (2, 3), 10)
    for bottleneck in neck.bottlenecks:
        assert all(layer.bn.weight is None for layer in bottleneck.layers)
    assert isinstance(neck.bottlenecks[0].shortcut, nn.Identity)
    assert neck.bottlenecks[1].shortcut.bn.weight is not None


def test_the_classification_head_ends_with_it():
    model = build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='MDEQ', arch=dict(channels=(8, 8), downsample_times=0)),
            neck=[
                dict(
                    type='MDEQFuseScales',
                    in_channels=(8, 8),
                    head_channels=(2, 2),
                    out_channels=12,
                ),
                dict(type='GlobalAveragePooling'),
            ],
            head=dict(type='LinearClsHead', num_classes=5, in_channels=12),
        )
    )
    assert logits_of(model, torch.randn(2, 3, 8, 8)).shape == (2, 5)


@needs_shared('golden', 'golden_cls.pt')
def test_golden_logits():
    """From the official equilibrium to the official logits."""
    golden = official_golden()['eval']
    model, _ = official_classifier()
    features = tuple(m.double() for m in golden['equilibrium'])
    with torch.no_grad():
        for neck in model.neck:
            features = neck(features)
        logits = model.head(features)
    assert relative(logits, golden['logits']) < 1e-12


@pytest.mark.parametrize(
    'norm_cfg', [dict(type='SyncBN'), dict(type='BN', momentum=0.01, eps=1e-3)], ids=str
)
def test_norm_cfg(norm_cfg):
    neck = MDEQFuseScales((8, 16), (2, 3), 10, norm_cfg=norm_cfg)
    norms = [
        m for m in neck.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 3 + 4 + 1 + 1
    if 'eps' in norm_cfg:
        assert all((m.momentum, m.eps) == (0.01, 1e-3) for m in norms)
    else:
        assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert MODELS.get('MDEQFuseScales') is MDEQFuseScales


def test_initialisation():
    neck = MDEQFuseScales((32, 64), (24, 48), 512)
    neck.init_weights()
    for module in neck.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        MDEQFuseScales((8, 16), (2, 3), 10)


GOOD = dict(in_channels=(8, 16), head_channels=(2, 3), out_channels=10)


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (
            dict(head_channels=(2, 3, 4)),
            ValueError,
            ['[8, 16]', '[2, 3, 4]', 'unequal'],
        ),
        (dict(in_channels=(8,)), ValueError, ['in_channels=[8]', '[2, 3]']),
        (dict(in_channels=8), TypeError, ['in_channels', '8', 'list']),
        (dict(head_channels='23'), TypeError, ['head_channels', "'23'"]),
        (dict(in_channels=(8, 0)), ValueError, ['in_channels', '0', '1 or more']),
        (dict(head_channels=(2, -1)), ValueError, ['head_channels', '-1']),
        (dict(head_channels=(2, 1.5)), ValueError, ['head_channels', '1.5']),
        (dict(out_channels=0), ValueError, ['out_channels', '0', '1 or more']),
        (dict(out_channels=None), ValueError, ['out_channels', 'None']),
        (dict(expansion=0), ValueError, ['expansion', '0']),
        (dict(in_channels=(), head_channels=()), ValueError, ['in_channels', 'one']),
    ],
    ids=str,
)
def test_bad_input_is_refused(options, error, words):
    with pytest.raises(error) as found:
        MDEQFuseScales(**(GOOD | options))
    for word in words:
        assert word in str(found.value), (word, str(found.value))


@pytest.mark.parametrize('count', [1, 3])
def test_a_wrong_number_of_maps_is_refused(count):
    neck = MDEQFuseScales(**GOOD)
    maps = maps_of((8, 16, 32)[:count], (8, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match=rf'got {count} maps for 2 .*out_indices'):
        neck(maps)


class TestLoading:
    """A neck loads whole or not at all, like the backbone."""

    def neck(self, heads=(2, 3), **options):
        return MDEQFuseScales((8, 8), heads, 8, **options)

    def test_other_widths_are_refused(self):
        state = {f'neck.{k}': v for k, v in self.neck().state_dict().items()}
        model = torch.nn.ModuleDict(dict(neck=self.neck(heads=(2, 4))))
        with pytest.raises(RuntimeError, match=r'neck\.bottlenecks\.1.* has shape'):
            model.load_state_dict(state, strict=False)

    def test_a_checkpoint_without_a_neck_leaves_it_alone(self):
        model = torch.nn.ModuleDict(dict(neck=self.neck()))
        before = model.state_dict()['neck.final.conv.weight'].clone()
        model.load_state_dict(dict(a=torch.ones(1)), strict=False)
        assert torch.equal(model.state_dict()['neck.final.conv.weight'], before)

    def test_pretrained(self, tmp_path):
        path = str(tmp_path / 'a.pth')
        source = self.neck()
        torch.save({f'neck.0.{k}': v for k, v in source.state_dict().items()}, path)
        cfg = dict(type='Pretrained', checkpoint=path, prefix='neck.0.')
        neck = self.neck(init_cfg=cfg)
        neck.init_weights()
        for a, b in zip(neck.parameters(), source.parameters(), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match='set its channels'):
            self.neck(heads=(2, 4), init_cfg=cfg).init_weights()


class TestRecomputation:
    def pair(self):
        torch.manual_seed(0)
        options = dict(in_channels=(8, 16), head_channels=(4, 8), out_channels=24)
        plain = MDEQFuseScales(**options).double().train()
        again = MDEQFuseScales(**options, with_cp=True).double().train()
        again.load_state_dict(plain.state_dict())
        return plain, again

    def test_same_numbers_as_without(self):
        plain, again = self.pair()
        maps = [torch.randn(3, 8, 8, 6).double(), torch.randn(3, 16, 4, 3).double()]
        results = []
        for neck in (plain, again):
            inputs = tuple(m.clone().requires_grad_() for m in maps)
            (out,) = neck(inputs)
            out.square().sum().backward()
            grads = [p.grad for p in neck.parameters()] + [m.grad for m in inputs]
            results.append((out, grads, neck.state_dict()))
        (out, grads, state), (out2, grads2, state2) = results
        assert torch.equal(out, out2)
        for a, b in zip(grads, grads2, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        # The statistics of the batch norms were updated once.
        assert all(torch.equal(state[k], state2[k]) for k in state)
        assert state2['final.bn.num_batches_tracked'] == 1

    def test_keeps_its_inputs_alone(self):
        _, neck = self.pair()
        maps = (
            torch.randn(3, 8, 8, 6).double().requires_grad_(),
            torch.randn(3, 16, 4, 3).double().requires_grad_(),
        )
        assert saved_bytes(lambda: neck(maps)) == sum(m.nbytes for m in maps)
