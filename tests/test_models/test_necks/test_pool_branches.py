"""Pooled branches against a few lines of plain PyTorch."""

import pytest
import torch
from mmengine.registry import init_default_scope
from torch import nn

from mdeq_mm.models import MDEQPoolBranches
from mdeq_mm.registry import MODELS
from tests.helpers import relative


def maps_of(n, channels=(3, 5), sides=((6, 4), (3, 2))):
    return tuple(
        torch.randn(n, c, *s).double() for c, s in zip(channels, sides, strict=True)
    )


def plain(maps, weight=1.0, bias=0.0, mean=None, var=None):
    """Means over pixels side by side, and their norm over the batch."""
    x = torch.cat([m.flatten(2).sum(2) / m[0, 0].numel() for m in maps], 1)
    mean = x.mean(0) if mean is None else mean
    var = (x - mean).square().mean(0) if var is None else var
    return weight * (x - mean) / (var + 1e-5).sqrt() + bias


def test_in_training():
    neck = MDEQPoolBranches((3, 5)).double().train()
    with torch.no_grad():
        neck.norm.weight.uniform_(0.5, 2)
        neck.norm.bias.normal_()
    maps = maps_of(7)
    (found,) = neck(maps)
    assert found.shape == (7, 8)
    assert relative(found, plain(maps, neck.norm.weight, neck.norm.bias)) < 1e-12
    # PyTorch's momentum of 0.1, and its variance over n - 1.
    x = torch.cat([m.mean((2, 3)) for m in maps], 1)
    assert relative(neck.norm.running_mean, 0.1 * x.mean(0)) < 1e-12
    assert relative(neck.norm.running_var, 0.9 + 0.1 * x.var(0)) < 1e-12


def test_in_evaluation():
    neck = MDEQPoolBranches([3, 5]).double().eval()
    mean, var = torch.randn(8).double(), torch.rand(8).double() + 0.5
    neck.norm.running_mean.copy_(mean)
    neck.norm.running_var.copy_(var)
    maps = maps_of(4)
    (found,) = neck(maps)
    assert relative(found, plain(maps, mean=mean, var=var)) < 1e-12
    (alone,) = neck(tuple(m[2:3] for m in maps))
    assert relative(alone, found[2:3]) < 1e-12


def test_small_differences_between_images_come_back_to_unit_variance():
    """As of group-normalised maps, whose means over pixels hardly differ."""
    maps = maps_of(64)
    maps = tuple(m - 0.9 * m.mean((2, 3), keepdim=True) + 2 for m in maps)
    pooled = torch.cat([m.mean((2, 3)) for m in maps], 1)
    assert pooled.std(0).max() < 0.06 and pooled.mean(0).min() > 1.9
    (found,) = MDEQPoolBranches((3, 5)).double()(maps)
    assert found.mean(0).abs().max() < 1e-12
    # But for the norm's eps of 1e-5.
    assert (found.std(0, unbiased=False) - 1).abs().max() < 0.03


def test_a_batch_of_one_in_training_is_normalised_by_the_running_statistics():
    neck = MDEQPoolBranches(4).double().train()
    neck((torch.randn(16, 4, 3, 3).double(),))
    before = {k: v.clone() for k, v in neck.state_dict().items()}
    maps = (torch.randn(1, 4, 3, 3).double().requires_grad_(),)
    (found,) = neck(maps)
    mean, var = neck.norm.running_mean, neck.norm.running_var
    assert relative(found, plain(maps, mean=mean, var=var)) < 1e-12
    assert all(torch.equal(neck.state_dict()[k], v) for k, v in before.items())
    found.sum().backward()
    expected = 1 / (9 * (var + 1e-5).sqrt())
    assert relative(maps[0].grad[0, :, 0, 0], expected) < 1e-12
    assert neck.norm.bias.grad.eq(1).all()


def test_other_norms():
    neck = MDEQPoolBranches((3, 5), norm_cfg=dict(type='LN')).double()
    maps = maps_of(1)
    x = torch.cat([m.mean((2, 3)) for m in maps], 1)
    assert isinstance(neck.norm, nn.LayerNorm)
    assert relative(neck(maps)[0], nn.functional.layer_norm(x, (8,))) < 1e-12


@pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain', 'mmseg'])
def test_builds_under_every_scope(scope):
    if scope != 'mmengine':
        pytest.importorskip(scope)
    init_default_scope(scope)
    neck = MODELS.build(dict(type='MDEQPoolBranches', in_channels=(3, 5)))
    assert isinstance(neck, MDEQPoolBranches)
    assert neck.norm.num_features == 8


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(in_channels=0), ValueError, ['in_channels=0', '1 or more']),
        (dict(in_channels=(4, -1)), ValueError, ['in_channels=-1']),
        (dict(in_channels='8'), TypeError, ['in_channels', "'8'"]),
        (dict(in_channels=None), TypeError, ['in_channels', 'None']),
        (dict(in_channels=()), ValueError, ['in_channels', 'empty']),
        (dict(norm_cfg=dict(type='N')), ValueError, ["'N'", 'no norm of 8 channels']),
        (dict(norm_cfg='BN1d'), TypeError, ['norm_cfg', "'BN1d'"]),
        (dict(init_cfg=3), TypeError, ['init_cfg', '3']),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, error, words):
    with pytest.raises(error) as found:
        MDEQPoolBranches(**(dict(in_channels=(3, 5)) | options))
    for word in words:
        assert word in str(found.value), (word, str(found.value))


@pytest.mark.parametrize('channels', [(3,), (5, 3), (3, 5, 8)])
def test_other_maps_are_refused(channels):
    neck = MDEQPoolBranches((3, 5))
    maps = tuple(torch.randn(2, c, 4, 4) for c in channels)
    with pytest.raises(ValueError, match='in_channels') as found:
        neck(maps)
    for word in ('MDEQPoolBranches', str(channels), '(3, 5)', 'out_indices'):
        assert word in str(found.value), (word, str(found.value))
