"""One layer in several threads, and its replicas."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from mdeq_mm.implicit import EquilibriumLayer
from mdeq_mm.implicit.layer import recorded
from tests.helpers import GRADIENTS, gradient_of, relative

EXACT = dict(type='BroydenSolver', max_steps=60, tol=1e-13)
COUNT = 4


class F(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = weight_norm(nn.Linear(6, 6))
        with torch.no_grad():
            self.inner.parametrizations.weight.original0.mul_(0.7)

    def forward(self, maps, x):
        return [torch.tanh(self.inner(maps[0]) + x)]


@pytest.fixture
def inputs():
    """Of another size in each thread, and of other numbers of steps."""
    return [torch.randn(i + 1, 6).double() * 3**i for i in range(COUNT)]


def make(name='implicit', **options):
    gradient, recompute = gradient_of(name, steps=40)
    return EquilibriumLayer(
        F().double(), EXACT, gradient, recompute=recompute, **options
    )


def at_once(work, arguments, rounds=5):
    """Results of ``work`` in as many threads as there are arguments, some times."""
    barrier = threading.Barrier(len(arguments), timeout=60)

    def run(argument):
        found = []
        for _ in range(rounds):
            barrier.wait()
            found.append(work(argument))
        return found

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def solve(layer, x):
    (out,) = layer([torch.zeros_like(x)], x)
    return out.detach(), layer.last_solution


def test_each_thread_has_its_own_solution(inputs):
    layer = make().eval()
    expected = [solve(layer, x) for x in inputs]
    mine = layer.last_solution
    found = at_once(lambda x: solve(layer, x), inputs)
    for runs, (out, solution) in zip(found, expected, strict=True):
        for again, report in runs:
            assert torch.equal(again, out)
            assert torch.equal(report.residual, solution.residual)
            assert torch.equal(report.steps, solution.steps)
    assert layer.last_solution is mine


@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients(inputs, name):
    layer = make(name)
    parameters = list(layer.parameters())

    def work(x):
        (out,) = layer([torch.zeros_like(x)], x)
        return torch.autograd.grad(out.square().sum(), parameters)

    expected = [work(x) for x in inputs]
    for runs, grads in zip(at_once(work, inputs, 3), expected, strict=True):
        assert all(relative(found, grads) < 1e-12 for found in runs)


def test_recorded_solutions_are_of_the_thread(inputs):
    layer = make().eval()

    def work(x):
        with recorded([layer]) as found, recorded([layer]) as twice:
            layer([torch.zeros_like(x)], x)
            layer([torch.zeros_like(x)], x)
        layer([torch.zeros_like(x)], x)
        assert twice == found
        return found

    for runs, x in zip(at_once(work, inputs), inputs, strict=True):
        assert [[len(s.value) for s in run] for run in runs] == [[len(x)] * 2] * 5


def test_watchers_are_of_the_thread(inputs):
    layer = make().eval()
    layer.observe = lambda *_: pytest.fail('of another thread')

    # Whether gradients are wanted belongs to a thread too.
    @torch.no_grad()
    def work(x):
        rows = []
        layer.observe = lambda indices, maps, residual: rows.append(len(indices))
        layer([torch.zeros_like(x)], x)
        return rows, layer.last_solution

    for runs in at_once(work, inputs):
        assert all(sum(rows) == s.steps.sum() for rows, s in runs)


@pytest.fixture
def replicas(monkeypatch):
    """``torch.nn.parallel.replicate``, of which copying to GPUs is replaced."""
    module = importlib.import_module('torch.nn.parallel.replicate')
    monkeypatch.setattr(
        module,
        '_broadcast_coalesced_reshape',
        lambda tensors, devices, detach=False: [
            [t.clone() for t in tensors] for _ in devices
        ],
    )
    return lambda layer: module.replicate(layer, range(COUNT))


@pytest.mark.parametrize('name', GRADIENTS)
def test_replicas_of_data_parallel(inputs, replicas, name):
    layer = make(name)
    layer.jacobian_probes, layer.jacobian_seed = 1, 0

    def work(pair):
        replica, x = pair
        (out,) = replica([torch.zeros_like(x)], x)
        return out, replica.last_solution, replica.take_jacobian_loss()

    def gradients(outs):
        total = sum(out.square().sum() + 0.1 * loss for out, _, loss in outs)
        return torch.autograd.grad(total, list(layer.parameters()))

    expected = [work((layer, x)) for x in inputs]
    runs = at_once(work, list(zip(replicas(layer), inputs, strict=True)), rounds=1)
    found = [run[0] for run in runs]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1].steps, b[1].steps)
        assert torch.equal(a[2], b[2])
    assert relative(gradients(found), gradients(expected)) < 1e-12
    assert layer.take_jacobian_loss() is None
