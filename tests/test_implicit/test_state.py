import pytest
import torch

from mdeq_mm.implicit import StateSpec
from mdeq_mm.implicit.state import has_channels_last


@pytest.fixture
def maps():
    return [torch.randn(2, 3, 5, 4), torch.randn(2, 6, 3, 2), torch.randn(2, 7)]


def test_sizes(maps):
    spec = StateSpec.of(maps)
    assert spec.shapes == ((3, 5, 4), (6, 3, 2), (7,))
    assert spec.sizes == (60, 36, 7)
    assert spec.dim == 103
    assert spec.zeros(4, dtype=torch.float64).shape == (4, 103)


def test_order_is_map_after_map_each_from_channels_first(maps):
    flat = StateSpec.of(maps).pack(maps)
    assert torch.equal(flat[1, :60], maps[0][1].reshape(-1))
    assert torch.equal(flat[1, 60:96], maps[1][1].reshape(-1))
    assert torch.equal(flat[1, 96:], maps[2][1])


def test_unpack_undoes_pack_and_copies_nothing(maps):
    spec = StateSpec.of(maps)
    flat = spec.pack(maps)
    again = spec.unpack(flat)
    assert all(torch.equal(a, b) for a, b in zip(again, maps, strict=True))
    assert all(
        m.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        for m in again
    )


def test_pack_copies_even_a_single_map():
    z = torch.zeros(2, 3)
    StateSpec.of([z]).pack([z]).add_(1)
    assert z.eq(0).all()


def test_type_and_gradient(maps):
    spec = StateSpec.of(maps)
    maps[0].requires_grad_()
    flat = spec.pack(maps, torch.float64)
    assert flat.dtype == torch.float64
    flat.square().sum().backward()
    torch.testing.assert_close(maps[0].grad, 2 * maps[0].detach())


def test_maps_of_other_shapes_are_refused(maps):
    spec = StateSpec.of(maps)
    with pytest.raises(ValueError, match=r'\(3, 4, 4\).*do not fit.*\(3, 5, 4\)'):
        spec.pack([maps[0][:, :, :4], *maps[1:]])
    with pytest.raises(ValueError, match='must return maps of the shapes'):
        spec.pack(maps[:2])


class TestChannelsLast:
    @pytest.fixture
    def maps(self):
        shapes = [(2, 4, 3, 5), (2, 8, 2, 3)]
        return [torch.randn(s).to(memory_format=torch.channels_last) for s in shapes]

    def test_there_and_back(self, maps):
        spec = StateSpec.of(maps, channels_last=True)
        flat = spec.pack(maps)
        found = spec.unpack(flat)
        for mine, expected in zip(found, maps, strict=True):
            assert torch.equal(mine, expected)
            # A view of the state in the same format, and not a copy.
            assert mine[0].stride() == expected[0].stride()
            assert mine.untyped_storage().data_ptr() == flat.data_ptr()

    def test_maps_of_either_format_are_taken(self, maps):
        spec = StateSpec.of(maps, channels_last=True)
        mixed = [maps[0].contiguous(), maps[1]]
        assert torch.equal(spec.pack(mixed), spec.pack(maps))
        assert torch.equal(
            StateSpec.of(mixed).pack(maps),
            torch.cat([m.contiguous().flatten(1) for m in maps], 1),
        )

    def test_what_has_them_last(self, maps):
        assert all(map(has_channels_last, maps))
        for other in (maps[0].contiguous(), maps[0][:, :1].contiguous(), maps[0][0]):
            assert not has_channels_last(other)

    def test_vectors_beside_maps(self):
        maps = [torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
                torch.randn(2, 7)]  # fmt: skip
        spec = StateSpec.of(maps, channels_last=True)
        for mine, expected in zip(spec.unpack(spec.pack(maps)), maps, strict=True):
            assert torch.equal(mine, expected)
