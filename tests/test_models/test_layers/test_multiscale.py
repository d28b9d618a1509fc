"""F against a second implementation, written as formulas over a state dict."""

import pytest
import torch
from torch.nn.functional import conv2d, group_norm, interpolate

from mdeq_mm.models import MDEQ
from mdeq_mm.models.layers import MultiscaleFunction, ResidualBlock
from tests.helpers import relative


class Reference:
    """The official f as it is described, without modules.

    Args:
        state (dict): State dict of a MultiscaleFunction.
        groups (int): Groups of the norms.
    """

    def __init__(self, state, groups):
        self.state, self.groups = state, groups

    def conv(self, x, name, stride=1):
        parts = f'{name}.parametrizations.weight.original'
        if parts + '1' in self.state:
            g, v = self.state[parts + '0'], self.state[parts + '1']
            w = g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        else:
            w = self.state[name + '.weight']
        return conv2d(x, w, stride=stride, padding=w.shape[2] // 2)

    def norm(self, x, name, groups=None):
        weight = self.state.get(name + '.weight')
        bias = self.state.get(name + '.bias')
        return group_norm(x, groups or self.groups, weight, bias, 1e-5)

    def block(self, z, name, injection=0, mask=1):
        h = self.norm(self.conv(z, name + '.conv1'), name + '.norm1').relu()
        h = mask * self.conv(h, name + '.conv2') + injection
        h = self.norm(h, name + '.norm2') + z
        return self.norm(h.relu(), name + '.norm3')

    def path(self, x, i, j, size):
        name = f'fusion.paths.{i}.{j}'
        if j > i:
            x = self.norm(self.conv(x, name + '.conv'), name + '.norm')
            return interpolate(x, size=size, mode='nearest')
        for k in range(i - j):
            x = self.conv(x, f'{name}.{3 * k}', stride=2)
            x = self.norm(x, f'{name}.{3 * k + 1}')
            if k < i - j - 1:
                x = x.relu()
        return x

    def __call__(self, maps, injections, masks, blocks):
        masks = iter(masks or [1] * sum(blocks))
        out = []
        for i, z in enumerate(maps):
            for k in range(blocks[i]):
                enters = injections[i] if i < len(injections) and k == 0 else 0
                z = self.block(z, f'branches.{i}.{k}', enters, next(masks))
            out.append(z)
        fused = []
        for i, z in enumerate(out):
            others = [
                self.path(x, i, j, z.shape[2:]) for j, x in enumerate(out) if j != i
            ]
            y = (z + sum(others)).relu()
            y = self.conv(y, f'post_convs.{i}')
            fused.append(self.norm(y, f'post_norms.{i}', self.groups // 2))
        return fused


def sizes_of(height, width, branches):
    sizes = []
    for _ in range(branches):
        sizes.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return sizes


@pytest.mark.parametrize(
    ('channels', 'blocks', 'size', 'options'),
    [
        ((8, 16), (1, 1), (8, 8), dict()),
        ((4, 8, 12), (1, 1, 1), (8, 12), dict()),
        ((4, 4, 8, 16), (1, 1, 1, 1), (8, 8), dict(post_gn_affine=False)),
        ((4, 4, 4, 4, 8), (1, 1, 1, 1, 1), (16, 16), dict(weight_norm=False)),
        ((4, 8, 4), (2, 1, 3), (8, 8), dict()),
        ((4, 8, 12), (1, 1, 1), (7, 5), dict()),
        ((4, 8, 12), (1, 2, 1), (13, 4), dict(expansion=1)),
        ((4, 8), (1, 1), (1, 9), dict(expansion=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize('dropout', [False, True])
@pytest.mark.parametrize('everywhere', [False, True])
def test_against_formulas(channels, blocks, size, options, dropout, everywhere):
    injected = len(channels) if everywhere else 1
    options = dict(expansion=2, post_gn_affine=True, injected=injected) | options
    f = MultiscaleFunction(channels, blocks, num_groups=4, **options).double()
    with torch.no_grad():
        for parameter in f.parameters():
            # So that no affine parameter is 1 or 0.
            parameter.add_(0.3 * torch.randn_like(parameter))
    n = 2
    maps = [
        torch.randn(n, c, *s).double()
        for c, s in zip(channels, sizes_of(*size, len(channels)), strict=True)
    ]
    injections = [torch.randn_like(m) for m in maps[:injected]]
    masks = []
    if dropout:
        masks = [
            torch.randint(2, (n, c, 1, 1)).double() / 0.5
            for c, k in zip(channels, blocks, strict=True)
            for _ in range(k)
        ]
    out = f(maps, *injections, *masks)
    expected = Reference(f.state_dict(), 4)(maps, injections, masks, blocks)
    assert [m.shape for m in out] == [m.shape for m in maps]
    for a, b in zip(out, expected, strict=True):
        assert relative(a, b) < 1e-12


def test_which_layers_are_normalised():
    f = MultiscaleFunction((4, 8), (1, 1), 4, 2, post_gn_affine=False)
    normalised = {
        n.split('.parametrizations')[0] for n in f.state_dict() if 'orig' in n
    }
    assert normalised == {
        'branches.0.0.conv1',
        'branches.0.0.conv2',
        'branches.1.0.conv1',
        'branches.1.0.conv2',
        'post_convs.0',
        'post_convs.1',
    }
    assert not any(n.endswith('bias') and 'conv' in n for n in f.state_dict())
    assert not any(n.startswith('post_norms') for n in f.state_dict())


def test_normalised_weights_start_as_plain_ones_would():
    """The norm of the weight as PyTorch initialises it goes into g."""
    torch.manual_seed(1)
    plain = torch.nn.Conv2d(4, 8, 3, bias=False)
    torch.manual_seed(1)
    normalised = ResidualBlock(4, 2, 4)
    torch.testing.assert_close(normalised.conv1.weight, plain.weight)
    g = normalised.conv1.parametrizations.weight.original0
    assert g.shape == (8, 1, 1, 1)


def test_the_scale_of_v_does_not_matter():
    block = ResidualBlock(4, 2, 4).double()
    z = torch.randn(2, 4, 5, 5).double()
    before = block(z)
    with torch.no_grad():
        block.conv1.parametrizations.weight.original1.mul_(7)
    assert relative(block(z), before) < 1e-12


def test_a_fully_dropped_branch_keeps_its_residual():
    block = ResidualBlock(4, 2, 4).double()
    z = torch.randn(2, 4, 5, 5).double()
    mask = torch.zeros(2, 4, 1, 1).double()
    # norm2 of zeros is its bias.
    expected = group_norm(
        (z + block.norm2.bias[:, None, None]).relu(),
        4,
        block.norm3.weight,
        block.norm3.bias,
    )
    assert relative(block(z, mask=mask), expected) < 1e-12


def test_upsampling_of_odd_sizes_copies_the_nearest():
    f = MultiscaleFunction((4, 4), (1, 1), 4, 1, True)
    up = f.fusion.paths[0]['1']
    x = torch.randn(1, 4, 3, 2)
    out = up(x, (5, 3))
    small = up.norm(up.conv(x))
    rows, columns = [0, 0, 1, 1, 2], [0, 0, 1]
    assert torch.equal(out, small[:, :, rows][:, :, :, columns])


class OfficialReference(Reference):
    """With the official upsampling, by a factor whatever the size it meets."""

    def path(self, x, i, j, size):
        if j < i:
            return super().path(x, i, j, size)
        name = f'fusion.paths.{i}.{j}'
        x = self.norm(self.conv(x, name + '.conv'), name + '.norm')
        return interpolate(x, scale_factor=2 ** (j - i), mode='nearest')


@pytest.mark.parametrize(
    'size',
    [(64, 96), (32, 256), (256, 32), (61, 93), (63, 126), (512, 1024)],
    ids=str,
)
def test_sizes_that_the_official_model_takes_give_its_numbers(size):
    """States of floored sizes, and images of which the stem makes even ones."""
    arch = dict(channels=(4, 4, 4, 4), num_groups=2, expansion=1, injection='first')
    backbone = MDEQ(arch=arch).double().eval()
    with torch.no_grad():
        (injection,) = backbone.inject(torch.rand(1, 3, *size).double())
        height, width = injection.shape[2:]
        maps = [
            torch.randn(1, 4, height // 2**i, width // 2**i).double() for i in range(4)
        ]
        assert [z.shape for z in backbone._start(injection)] == [m.shape for m in maps]
        f = backbone.equilibrium.f
        found = f(maps, injection)
        expected = OfficialReference(f.state_dict(), 2)(maps, [injection], [], [1] * 4)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-12
