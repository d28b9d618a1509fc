"""Solves that start from the equilibria of the call before."""

import pytest
import torch

from tests.helpers import project_classifier, relative

SOLVER = dict(type='AndersonSolver', max_steps=40, tol=1e-8)


@pytest.fixture
def backbone():
    backbone = project_classifier(eval_solver=SOLVER).backbone
    backbone.warm_start = True
    return backbone


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16).double()


@torch.no_grad()
def solve(backbone, images):
    maps = backbone(images)
    return maps, backbone.last_solution.steps


def test_the_same_images_again_take_one_evaluation(backbone, images):
    first, steps = solve(backbone, images)
    again, fewer = solve(backbone, images)
    assert steps.min() > 5 and fewer.tolist() == [1, 1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_similar_images_take_fewer_and_give_the_same(backbone, images):
    solve(backbone, images)
    moved = images + 1e-4 * torch.randn_like(images)
    warm, fewer = solve(backbone, moved)
    backbone.warm_start = False
    cold, steps = solve(backbone, moved)
    assert (fewer < steps).all()
    for a, b in zip(warm, cold, strict=True):
        assert relative(a, b) < 1e-6


def test_off_by_default(images):
    backbone = project_classifier(eval_solver=SOLVER).backbone
    assert backbone.warm_start is False
    _, first = solve(backbone, images)
    _, second = solve(backbone, images)
    assert torch.equal(first, second)


@pytest.mark.parametrize('size', [(2, 3, 24, 16), (3, 3, 16, 16)], ids=str)
def test_other_shapes_start_anew(backbone, images, size):
    solve(backbone, images)
    other = torch.randn(size).double()
    found, steps = solve(backbone, other)
    backbone.warm_start = False
    expected, cold = solve(backbone, other)
    assert torch.equal(steps, cold)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_training_starts_from_zeros(backbone, images):
    solve(backbone, images)
    backbone.train()
    backbone(images)
    trained = backbone.last_solution.steps
    backbone(images)
    assert torch.equal(backbone.last_solution.steps, trained)
    assert trained.min() > 5


def test_a_failed_sample_starts_anew(backbone, images):
    bad = images.clone()
    bad[0, 0, 0, 0] = torch.nan
    solve(backbone, bad)
    assert not backbone.last_solution.residual[0].isfinite()
    found, steps = solve(backbone, images)
    backbone.warm_start = False
    expected, cold = solve(backbone, images)
    assert steps[0] == cold[0]
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize('change', ['sides', 'format'])
def test_the_state_before_is_put_where_it_belongs(change):
    """As large in another shape it is no start; in another memory format it is."""
    backbone = project_classifier(warm_start=True).backbone
    images = torch.randn(2, 3, 16, 24).double()
    starts = []
    backbone.equilibrium.register_forward_pre_hook(
        lambda layer, args: starts.append([m.clone() for m in args[0]])
    )
    with torch.no_grad():
        first = backbone(images)
        if change == 'sides':
            backbone(images.transpose(2, 3).contiguous())
            assert all(not m.any() for m in starts[1])
        else:
            backbone.to(memory_format=torch.channels_last)
            backbone(images.to(memory_format=torch.channels_last))
            for start, found in zip(starts[1], first, strict=True):
                torch.testing.assert_close(start, found)
                assert start.is_contiguous(memory_format=torch.channels_last)
            assert backbone.last_solution.steps.max() <= 2


@pytest.mark.parametrize('scale', [1e-3, 1e3])
def test_an_absolute_residual_is_compared_with_the_equilibrium(images, scale):
    """It is a good start where it is small beside z*, whatever its own size."""
    backbone = project_classifier(eval_solver=SOLVER | dict(norm='abs')).backbone
    backbone.warm_start = True
    solve(backbone, images)
    last = backbone.last_solution
    sizes = torch.linalg.vector_norm(last.value, dim=1)
    starts = []
    backbone.equilibrium.register_forward_pre_hook(
        lambda layer, args: starts.append([m.clone() for m in args[0]])
    )
    # As the solver would leave them: above 1 and good, below 1 and worse than zero.
    last.value *= scale
    last.residual = sizes * scale * torch.tensor([0.01, 1.5]).double()
    solve(backbone, images)
    assert all(m[0].any() and not m[1].any() for m in starts[0])
