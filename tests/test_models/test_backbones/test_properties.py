"""Any number of branches, any size, any solver with any gradient."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdeq_mm.implicit import Status
from mdeq_mm.models import MDEQ
from tests.helpers import relative

SOLVERS = st.sampled_from(
    [
        dict(type='PicardSolver', damping=0.7),
        dict(type='AndersonSolver', memory=3),
        dict(type='BroydenSolver'),
        dict(type='BroydenSolver', memory=2),
    ]
)
GRADIENTS = st.sampled_from(
    [
        dict(type='ImplicitGradient', solver=dict(type='PicardSolver', max_steps=3)),
        dict(type='ImplicitGradient', solver=dict(type='AndersonSolver', max_steps=4)),
        dict(type='ImplicitGradient', solver=dict(type='BroydenSolver', max_steps=4)),
        dict(type='PhantomGradient', steps=2),
        dict(type='PhantomGradient', steps=2, unroll=True),
        dict(type='UnrolledGradient', steps=3),
    ]
)


@st.composite
def cases(draw):
    branches = draw(st.integers(2, 5))
    # At least two channels a group: PyTorch refuses to normalise a single number.
    halvings = draw(st.integers(0, 3))
    arch = dict(
        channels=draw(
            st.lists(st.sampled_from([4, 6, 8]), min_size=branches, max_size=branches)
        ),
        num_groups=2,
        expansion=draw(st.integers(1, 2)),
        downsample_times=halvings,
        dropout=draw(st.sampled_from([0.0, 0.3])),
        injection=draw(st.sampled_from(['all', 'first'])),
        post_gn_affine=draw(st.booleans()),
        weight_norm=draw(st.booleans()),
    )
    least = 2 ** (halvings + branches - 1)
    # Up to tall, wide and odd ones, at a bounded number of pixels.
    long = st.integers(least, max(least, 48))
    size = draw(
        st.sampled_from([(least, least), (97, 143), (least, 96), (131, least)])
        | st.tuples(long, long)
    )
    if min(size) < least:
        size = (least, least)
    return dict(
        arch=arch,
        size=size,
        n=draw(st.integers(1, 3)),
        solver=draw(SOLVERS) | dict(max_steps=draw(st.integers(1, 6)), tol=1e-3),
        gradient=draw(GRADIENTS),
        with_cp=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


def shapes(arch, size, n):
    height, width = size
    for _ in range(arch['downsample_times']):
        height, width = (height + 1) // 2, (width + 1) // 2
    found = []
    for channels in arch['channels']:
        found.append((n, channels, height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_shapes_and_numbers(case):
    torch.manual_seed(case['seed'])
    backbone = MDEQ(
        arch=case['arch'],
        solver=case['solver'],
        gradient=case['gradient'],
        with_cp=case['with_cp'],
        # One sample of one pixel has no batch statistics.
        norm_cfg=dict(type='GN', num_groups=1),
        out_norm_cfg=None,
    ).double()
    backbone.init_weights()
    images = torch.randn(case['n'], 3, *case['size']).double()
    inputs = []
    backbone.equilibrium.register_forward_pre_hook(
        lambda module, given: inputs.append(given)
    )

    maps = backbone.train()(images)
    solution = backbone.last_solution
    assert [tuple(m.shape) for m in maps] == shapes(
        case['arch'], case['size'], case['n']
    )
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    equation = backbone.equilibrium.equation(*inputs[0])
    expected = equation(solution.value)
    residual = (expected - solution.value).norm(dim=1) / expected.norm(dim=1)
    if not case['gradient'].get('unroll'):
        assert relative(flat, expected) < 1e-11
    else:
        assert relative(flat, equation(expected)) < 1e-9
    torch.testing.assert_close(solution.residual, residual.detach())
    assert solution.status.ne(Status.DIVERGED).all()

    flat.square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    backbone.eval()
    with torch.no_grad():
        maps = backbone(images)
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    assert torch.equal(flat, backbone.last_solution.value)


@settings(max_examples=15)
@given(st.integers(2, 5), st.integers(0, 2), st.integers(1, 7))
def test_one_pixel_below_the_coarsest_one(branches, halvings, extra):
    backbone = MDEQ(
        arch=dict(
            channels=[4] * branches,
            num_groups=2,
            expansion=1,
            downsample_times=halvings,
        )
    )
    least = 2 ** (halvings + branches - 1)
    for size in ((least - 1, least + extra), (least + extra, least - 1)):
        with torch.no_grad():
            maps = backbone.eval()(torch.rand(1, 3, *size))
        coarsest = maps[-1].shape[2:]
        assert coarsest == tuple(math.ceil(side / least) for side in size)
        assert all(m.isfinite().all() for m in maps)
