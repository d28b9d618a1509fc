import pytest
import torch

from mdeq_mm.models.layers import channel_mask


def test_one_number_a_sample_and_channel():
    mask = channel_mask(torch.zeros(5, 7, 3, 2), 0.5)
    assert mask.shape == (5, 7, 1, 1)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert mask.dtype == torch.float32
    # Not the same in all samples, nor in all channels.
    assert len(mask.flatten(1).unique(dim=0)) > 1
    assert len(mask.flatten(1).unique(dim=1)) > 1


@pytest.mark.parametrize('rate', [0.1, 0.25, 0.5, 0.9])
def test_rate_and_scale(rate):
    mask = channel_mask(torch.zeros(400, 400, 1, 1).double(), rate)
    assert mask.eq(0).double().mean().item() == pytest.approx(rate, abs=0.01)
    assert mask.mean().item() == pytest.approx(1, abs=0.03)
    assert mask.max().item() == pytest.approx(1 / (1 - rate))


def test_rate_zero_changes_nothing():
    assert channel_mask(torch.zeros(3, 4, 2, 2), 0.0).eq(1).all()


def test_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return channel_mask(torch.zeros(9, 9, 1, 1), 0.5, generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_type_follows_the_map():
    assert channel_mask(torch.zeros(1, 2, 1, 1).double(), 0.5).dtype == torch.float64
