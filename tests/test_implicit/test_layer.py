import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    EquilibriumLayer,
    ImplicitGradient,
    Status,
)
from tests.helpers import GRADIENTS, SOLVERS, cosine, gradient_of, relative

EXACT = dict(type='BroydenSolver', max_steps=80, tol=1e-13)


class F(nn.Module):
    """Two maps of different shapes that depend on each other."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 3)
        self.back = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            for layer in (self.one, self.two, self.back):
                layer.weight.mul_(0.7)

    def forward(self, maps, x, mask=None):
        a, b = maps
        a = torch.tanh(self.one(a) + self.back(b.flatten(1)) + x)
        if mask is not None:
            a = a * mask
        return [a, torch.tanh(self.two(a)).unflatten(1, (3, 1))]


@pytest.fixture
def f():
    return F().double()


@pytest.fixture
def start():
    return [torch.zeros(3, 4).double(), torch.zeros(3, 3, 1).double()]


@pytest.fixture
def x():
    return torch.randn(3, 4).double()


def make(f, gradient='implicit', **options):
    gradient, recompute = gradient_of(gradient, steps=60)
    return EquilibriumLayer(f, EXACT, gradient, recompute=recompute, **options)


def plain(f, start, *inputs, steps=300):
    for _ in range(steps):
        start = f(start, *inputs)
    return start


@pytest.mark.parametrize('name', GRADIENTS)
@pytest.mark.parametrize('training', [True, False])
def test_output_and_gradients(f, start, x, name, training):
    layer = make(f, name).train(training)
    x.requires_grad_()
    parameters = [*f.parameters(), x]
    out = layer(start, x)
    expected = plain(f, start, x)
    incoming = [torch.randn_like(m) for m in expected]
    assert [m.shape for m in out] == [m.shape for m in start]
    assert relative(out, expected) < 1e-10
    found = torch.autograd.grad(out, parameters, incoming)
    reference = torch.autograd.grad(expected, parameters, incoming)
    # In evaluation, what iterates is replaced by the implicit gradient's defaults.
    defaults = not training and name.startswith('unrolled')
    for a, b in zip(found, reference, strict=True):
        assert relative(a, b) < (1e-5 if defaults else 1e-9)


def test_training_gives_f_of_z_and_evaluation_z(f, start, x):
    layer = EquilibriumLayer(
        f,
        dict(type='PicardSolver', max_steps=3, tol=0),
        dict(type='ImplicitGradient'),
        eval_solver=dict(type='PicardSolver', max_steps=5, tol=0),
    )
    second, third, fourth = (plain(f, start, x, steps=n) for n in (2, 3, 4))
    out = layer(start, x)
    assert layer.last_solution.steps.tolist() == [3, 3, 3]
    # The third evaluation was at the second iterate, and is what training gives.
    assert relative(out, second) > 1e-6
    assert relative(out, third) < 1e-14
    with torch.no_grad():
        out = layer.eval()(start, x)
    assert layer.last_solution.steps.tolist() == [5, 5, 5]
    assert relative(out, fourth) < 1e-14


@pytest.mark.parametrize('name', ['implicit', 'phantom series'])
def test_evaluation_with_gradients_gives_the_same_numbers(f, start, x, name):
    layer = make(f, name).eval()
    layer.eval_solver = AndersonSolver(6, tol=0)
    with torch.no_grad():
        expected = layer(start, x)
    out = layer(start, x)
    assert all(m.requires_grad for m in out)
    assert relative(out, expected) < 1e-13


def test_evaluation_without_wanted_gradients_drops_finished_samples(f, start, x):
    class Counted(F):
        rows = []

        def forward(self, maps, x, mask=None):
            self.rows.append(len(x))
            return super().forward(maps, x, mask)

    net = Counted().double()
    layer = EquilibriumLayer(
        net, dict(type='PicardSolver', max_steps=99, tol=1e-6), EXACT_G
    )
    layer.eval()
    rows = Counted.rows
    with torch.no_grad():
        layer(start, x * torch.tensor([[1.0], [0.0], [30.0]]))
    assert sum(rows) == layer.last_solution.steps.sum()
    assert min(rows) < 3
    rows.clear()
    layer(start, x)
    assert set(rows) == {3}
    rows.clear()
    layer.requires_grad_(False)
    layer(start, x * torch.tensor([[1.0], [0.0], [30.0]]))
    assert sum(rows) == layer.last_solution.steps.sum()


EXACT_G = dict(type='ImplicitGradient', solver=EXACT)


class TestUnrolling:
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('name', ['implicit', 'phantom series', 'unrolled'])
    def test_in_place_of_a_solve(self, f, start, x, training, name):
        layer = make(f, name).train(training)
        layer.unroll_steps = 3
        out = layer(start, x)
        expected = plain(f, start, x, steps=3)
        assert relative(out, expected) < 1e-14
        found = torch.autograd.grad(out[0].sum(), list(f.parameters()))
        reference = torch.autograd.grad(expected[0].sum(), list(f.parameters()))
        assert relative(found, reference) < 1e-12
        assert layer.last_solution.steps.tolist() == [3, 3, 3]
        layer.unroll_steps = None
        assert relative(layer(start, x), plain(f, start, x)) < 1e-10

    def test_an_iterating_gradient_evaluates_by_the_solver(self, f, start, x):
        layer = EquilibriumLayer(f, EXACT, dict(type='UnrolledGradient', steps=2))
        layer(start, x)
        assert layer.last_solution.status.eq(Status.MAX_STEPS).all()
        layer.eval()
        with torch.no_grad():
            out = layer(start, x)
        assert layer.last_solution.converged.all()
        assert relative(out, plain(f, start, x)) < 1e-10


def test_last_solution(f, start, x):
    layer = make(f)
    assert layer.last_solution is None
    x.requires_grad_()
    layer.trace = True
    out = layer(start, x)
    solution = layer.last_solution
    assert solution.value.shape == (3, 7)
    assert solution.trace.shape == (solution.steps.max(), 3)
    for tensor in (solution.value, solution.residual, solution.trace):
        assert not tensor.requires_grad
    out[0].sum().backward()
    assert layer.last_solution.adjoint.converged.all()
    layer.trace = False
    layer.eval()(start, x)
    assert layer.last_solution is not solution
    assert layer.last_solution.trace is None
    assert 'last_solution' not in layer.state_dict()


def test_traces_of_evaluation(f, start, x):
    layer = make(f).eval()
    layer.trace = True
    with torch.no_grad():
        layer(start, x)
    assert layer.last_solution.trace is not None


def test_state_dict_is_that_of_f(f):
    layer = make(f)
    assert set(layer.state_dict()) == {f'f.{name}' for name in f.state_dict()}
    assert len(list(layer.parameters())) == len(list(f.parameters()))


def test_several_inputs(f, start, x):
    mask = torch.tensor([[1.0, 0, 1, 1]] * 3).double()
    layer = make(f)
    out = layer(start, x, mask)
    assert relative(out, plain(f, start, x, mask)) < 1e-10
    assert out[0][:, 1].eq(0).all()


def test_a_start_other_than_zero(f, x):
    layer = make(f)
    start = [torch.randn(3, 4).double(), torch.randn(3, 3, 1).double()]
    kept = [m.clone() for m in start]
    out = layer(start, x)
    assert relative(out, plain(f, start, x)) < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))
    warm = layer([m.detach() for m in out], x)
    assert layer.last_solution.steps.max() <= 2
    assert relative(warm, out) < 1e-11


def test_an_f_that_changes_shapes_is_refused():
    class Bad(nn.Module):
        def forward(self, maps):
            return [m[:, :-1] for m in maps]

    layer = EquilibriumLayer(Bad(), EXACT, EXACT_G)
    with pytest.raises(ValueError, match='f must return maps of the shapes'):
        layer([torch.zeros(2, 3)])


def test_an_f_without_parameters_or_inputs():
    class Cos(nn.Module):
        def forward(self, maps):
            return [m.cos() for m in maps]

    layer = EquilibriumLayer(Cos(), EXACT, EXACT_G)
    for training in (True, False):
        (out,) = layer.train(training)([torch.zeros(2, 3).double()])
        torch.testing.assert_close(out, torch.full((2, 3), 0.7390851332151607).double())


@pytest.mark.parametrize('field', ['solver', 'gradient', 'eval_solver'])
def test_errors_name_the_field(f, field):
    options = dict(solver=EXACT, gradient=EXACT_G, eval_solver=EXACT)
    options[field] = dict(type='Nothing')
    with pytest.raises(ValueError, match=f"{field}.type='Nothing'"):
        EquilibriumLayer(f, **options)


class TestPrecision:
    def test_reversible_gradient_under_autocast(self):
        """Its state is in double precision, which autocast does not narrow."""
        torch.manual_seed(1)
        f = F()
        start = [torch.zeros(3, 4), torch.zeros(3, 3, 1)]
        x = torch.randn(3, 4)
        gradient = dict(type='ReversibleGradient', steps=6, beta=0.5)
        layer = EquilibriumLayer(f, dict(type='AndersonSolver'), gradient)
        layer(start, x)[0].square().sum().backward()
        reference = [p.grad.clone() for p in f.parameters()]
        layer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(start, x)
        assert all(m.dtype == torch.float32 for m in out)
        out[0].square().sum().backward()
        found = [p.grad for p in f.parameters()]
        assert all(g.dtype == torch.float32 for g in found)
        assert cosine(found, reference) > 0.99

    @pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)
    def test_autocast_keeps_the_state_in_float32(self, kind):
        torch.manual_seed(1)
        f = F()
        start = [torch.zeros(3, 4), torch.zeros(3, 3, 1)]
        x = torch.randn(3, 4)
        solver = dict(type=kind.__name__, max_steps=30, tol=1e-3)
        layer = EquilibriumLayer(
            f, solver, dict(type='ImplicitGradient', solver=solver)
        )
        seen = []

        def watch(module, inputs, output):
            seen.append(output.dtype)

        layer(start, x)[0].square().sum().backward()
        reference = [p.grad.clone() for p in f.parameters()]
        layer.zero_grad()
        f.one.register_forward_hook(watch)
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(start, x)
        assert all(m.dtype == torch.float32 for m in out)
        assert layer.last_solution.value.dtype == torch.float32
        # Outside of the context, as training loops do it.
        out[0].square().sum().backward()
        assert set(seen) == {torch.bfloat16}
        found = [p.grad for p in f.parameters()]
        assert all(g.dtype == torch.float32 for g in found)
        assert all(g.isfinite().all() for g in found)
        assert cosine(found, reference) > 0.99

    @pytest.mark.parametrize('name', GRADIENTS)
    def test_autocast_with_every_gradient(self, name):
        torch.manual_seed(1)
        start = [torch.zeros(3, 4), torch.zeros(3, 3, 1)]
        x = torch.randn(3, 4)
        layer = make(F(), name)
        layer.solver = BroydenSolver(20, 1e-3)
        layer.gradient.solver = BroydenSolver(20, 1e-3)
        grads = []
        for enabled in (False, True):
            layer.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                out = layer(start, x)
            out[0].square().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        assert cosine(*grads) > 0.99

    @pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
    def test_types_of_a_whole_layer(self, f, dtype):
        layer = make(f).to(dtype)
        layer.solver = BroydenSolver(20, 1e-2)
        start = [torch.zeros(3, 4, dtype=dtype), torch.zeros(3, 3, 1, dtype=dtype)]
        x = torch.randn(3, 4, dtype=dtype)
        out = layer(start, x)
        wide = torch.promote_types(dtype, torch.float32)
        assert all(m.dtype == wide for m in out)
        out[0].sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all()


class TestCompanions:
    """What training loops do to a layer."""

    def test_copies_after_a_training_step(self, f, start, x):
        layer = make(f)
        layer(start, x)[0].sum().backward()
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.f.one.weight.mul_(0.5)
        assert relative(other(start, x), plain(other.f, start, x)) < 1e-10
        assert relative(layer(start, x), plain(f, start, x)) < 1e-10
        other.zero_grad()
        before = f.one.weight.grad.clone()
        other(start, x)[0].sum().backward()
        assert torch.equal(f.one.weight.grad, before)
        assert other.f.one.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize('name', GRADIENTS)
    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpointing_around_it(self, f, start, x, name, reentrant):
        layer = make(f, name)
        x.requires_grad_()
        parameters = [*f.parameters(), x]
        expected = torch.autograd.grad(layer(start, x)[0].sum(), parameters)
        out = checkpoint(lambda x: layer(start, x)[0], x, use_reentrant=reentrant)
        out.sum().backward()
        for parameter, reference in zip(parameters, expected, strict=True):
            assert relative(parameter.grad, reference) < 1e-9

    def test_functional_call(self, f, start, x):
        layer = make(f).eval()
        weights = {k: 0.5 * v.detach() for k, v in layer.named_parameters()}
        with torch.no_grad():
            out = torch.func.functional_call(layer, weights, (start, x))
            half = copy.deepcopy(f)
            for p in half.parameters():
                p.mul_(0.5)
            assert relative(out, plain(half, start, x)) < 1e-10

    def test_frozen_f(self, f, start, x):
        layer = make(f)
        layer.requires_grad_(False)
        x.requires_grad_()
        layer(start, x)[0].sum().backward()
        (expected,) = torch.autograd.grad(plain(f, start, x)[0].sum(), x)
        assert relative(x.grad, expected) < 1e-9
        assert all(p.grad is None for p in f.parameters())

    def test_one_parameter_frozen(self, f, start, x):
        layer = make(f)
        f.one.weight.requires_grad_(False)
        layer(start, x)[0].sum().backward()
        assert f.one.weight.grad is None
        assert f.two.weight.grad.abs().sum() > 0

    def test_two_passes_before_one_backward_pass(self, f, start, x):
        layer = make(f)
        (layer(start, x)[0].sum() + layer(start, 2 * x)[0].sum()).backward()
        expected = torch.autograd.grad(
            plain(f, start, x)[0].sum() + plain(f, start, 2 * x)[0].sum(),
            list(f.parameters()),
        )
        for parameter, reference in zip(f.parameters(), expected, strict=True):
            assert relative(parameter.grad, reference) < 1e-9

    def test_a_step_of_the_optimiser_in_between(self, f, start, x):
        """Weights changed in place before the backward pass are an error."""
        layer = make(f, 'implicit, recomputed')
        out = layer(start, x)[0].sum()
        with torch.no_grad():
            f.one.weight.add_(1)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            out.backward()

    def test_an_implicit_layer_inside_f(self, start, x):
        """An f that solves for itself: the inner layer is differentiated too."""
        inner = EquilibriumLayer(
            F().double(), EXACT, ImplicitGradient(BroydenSolver(60, 1e-13))
        )

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, maps, x):
                return self.inner([0 * m for m in maps], 0.5 * maps[0] + x)

        outer = Outer()
        layer = EquilibriumLayer(outer, EXACT, EXACT_G)
        out = layer(start, x)
        expected = plain(outer, start, x, steps=60)
        assert relative(out, expected) < 1e-9
        found = torch.autograd.grad(out[0].sum(), list(inner.parameters()))
        reference = torch.autograd.grad(expected[0].sum(), list(inner.parameters()))
        assert relative(found, reference) < 1e-7
