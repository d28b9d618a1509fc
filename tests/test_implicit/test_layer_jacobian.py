"""The Jacobian loss that a layer computes at its equilibrium."""

import copy
import pickle

import pytest
import torch

from mdeq_mm.implicit import EquilibriumLayer
from tests.helpers import relative
from tests.test_implicit.test_layer import EXACT, F


@pytest.fixture
def f():
    return F().double()


@pytest.fixture
def layer(f):
    layer = EquilibriumLayer(f, EXACT, dict(type='ImplicitGradient'))
    layer.jacobian_probes, layer.jacobian_seed = 3, 5
    return layer.train()


@pytest.fixture
def start():
    return [torch.zeros(3, 4).double(), torch.zeros(3, 3, 1).double()]


@pytest.fixture
def x():
    return torch.randn(3, 4).double()


def probes(seed, count=3, n=3, dim=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, dim, generator=generator, dtype=torch.float64)


def dense(f, z, x, probes):
    """||v' J||^2 / (N D) by whole Jacobians, differentiable in f's parameters."""

    def flat(z, x):
        out = f([z[None, :4], z[None, 4:].unflatten(1, (3, 1))], x[None])
        return torch.cat([m.flatten() for m in out])

    total = 0
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(
            lambda one, i=i: flat(one, x[i]), z[i], create_graph=True
        )
        total = total + (probes[:, i] @ jacobian).square().sum()
    return total / probes.numel()


def test_value_and_gradients_are_those_of_dense_jacobians(layer, f, start, x):
    x.requires_grad_()
    layer(start, x)
    found = layer.take_jacobian_loss()
    z = layer.last_solution.value
    expected = dense(f, z, x, probes(5))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = [*f.parameters(), x]
    grads = [torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
             for loss in (found, expected)]  # fmt: skip
    for mine, theirs in zip(*grads, strict=True):
        if theirs is None or not theirs.any():
            assert mine is None or mine.abs().max() < 1e-15
        else:
            assert relative(mine, theirs) < 1e-11


def test_gradients_of_the_output_are_left_alone(layer, f, start, x):
    found = []
    for count in (0, 3):
        layer.jacobian_probes = count
        out = torch.cat([m.flatten(1) for m in layer(start, x)], 1)
        found.append(torch.autograd.grad(out.square().sum(), list(f.parameters())))
        layer.take_jacobian_loss()
    assert relative(found[0], found[1]) < 1e-14


def test_it_is_taken_once(layer, start, x):
    layer(start, x)
    assert layer.take_jacobian_loss() is not None
    assert layer.take_jacobian_loss() is None


def test_several_passes_are_averaged_over_their_samples(layer, start, x):
    found = []
    for rows in (slice(0, 1), slice(1, 3)):
        layer([m[rows] for m in start], x[rows])
    both = layer.take_jacobian_loss()
    for seed, rows in ((5, slice(0, 1)), (6, slice(1, 3))):
        # The second pass of a step has probes of its own.
        layer.jacobian_seed = seed
        layer([m[rows] for m in start], x[rows])
        found.append(layer.take_jacobian_loss())
    assert both.item() == pytest.approx((found[0] + 2 * found[1]).item() / 3)


@pytest.mark.parametrize('unroll', [None, 4])
def test_unrolled_passes_have_it_too(layer, f, start, x, unroll):
    layer.unroll_steps = unroll
    layer(start, x)
    expected = dense(f, layer.last_solution.value, x, probes(5))
    assert layer.take_jacobian_loss().item() == pytest.approx(expected.item())


def test_not_in_evaluation(layer, start, x):
    layer.eval()
    layer(start, x)
    assert layer.take_jacobian_loss() is None


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_failed_samples_take_no_part(layer, f, start, x, value):
    x[1] = value
    layer(start, x)
    loss = layer.take_jacobian_loss()
    grads = torch.autograd.grad(loss, list(f.parameters()), allow_unused=True)
    assert loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in grads)


def test_nothing_where_all_samples_failed(layer, start, x):
    layer(start, torch.full_like(x, torch.nan))
    assert layer.take_jacobian_loss() is None


def test_copies_hold_no_loss(layer, start, x):
    layer(start, x)
    assert copy.deepcopy(layer).take_jacobian_loss() is None
    assert len(pickle.loads(pickle.dumps(layer._jacobian_losses))) == 0
    assert layer.take_jacobian_loss() is not None


def test_inspect_sees_each_solve_in_training(layer, start, x):
    seen = []

    def look(equation, solution):
        assert not torch.is_grad_enabled()
        seen.append((equation(solution.value) - solution.value).abs().max().item())

    layer.inspect = look
    layer(start, x)
    layer.eval()
    layer(start, x)
    assert len(seen) == 1 and seen[0] < 1e-12
