"""What all gradients share, and their accuracy by independent computations."""

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from mdeq_mm.implicit import (
    BroydenSolver,
    Equation,
    EquilibriumLayer,
    Gradient,
    ImplicitGradient,
    PhantomGradient,
    Status,
    UnrolledGradient,
)
from mdeq_mm.registry import GRADIENTS as GRADIENT_REGISTRY
from tests.helpers import (
    GRADIENTS,
    SOLVERS,
    cosine,
    gradient_of,
    matrix,
    project_classifier,
    relative,
    tanh,
)

every_gradient = pytest.mark.parametrize('name', GRADIENTS)
every_solver = pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)

exact = BroydenSolver(max_steps=80, tol=1e-13)


def start_of(equation):
    return torch.zeros_like(equation.tensors[1]).detach()


def grads_of(equation, out, incoming):
    return torch.autograd.grad(out, equation.tensors, incoming)


def dense(equation, incoming):
    """Gradients of tanh(z W' + x) by a dense solve with the whole Jacobian."""
    w, x = (t.detach() for t in equation.tensors)
    z = exact.solve(equation, start_of(equation)).value
    slope = 1 - z.square()
    eye = torch.eye(len(w)).double()
    dw, dx = torch.zeros_like(w), torch.zeros_like(x)
    for i in range(len(z)):
        jacobian = slope[i][:, None] * w
        y = torch.linalg.solve(eye - jacobian.T, incoming[i])
        dx[i] = y * slope[i]
        dw += torch.outer(y * slope[i], z[i])
    return dw, dx


def direct(equation, incoming, steps):
    """Gradients by autograd through a plain loop."""
    z = start_of(equation)
    for _ in range(steps):
        z = equation(z)
    return z, grads_of(equation, z, incoming)


@every_gradient
@every_solver
def test_against_a_dense_linear_solve(name, kind):
    gradient, recompute = gradient_of(name, steps=200)
    equation = tanh(4, 8, radius=0.8, recompute=recompute)
    incoming = torch.randn(4, 8).double()
    out, _ = gradient(equation, start_of(equation), kind(max_steps=200, tol=1e-13))
    found = grads_of(equation, out, incoming)
    for a, b in zip(found, dense(equation, incoming), strict=True):
        assert relative(a, b) < 1e-9


@every_gradient
def test_against_direct_differentiation(name):
    gradient, recompute = gradient_of(name, steps=150)
    equation = tanh(4, 8, radius=0.8, recompute=recompute)
    incoming = torch.randn(4, 8).double()
    out, _ = gradient(equation, start_of(equation), exact)
    z, expected = direct(equation, incoming, 400)
    assert relative(out, z) < 1e-11
    for a, b in zip(grads_of(equation, out, incoming), expected, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize('radius', [0.95, 1.3])
def test_implicit_gradient_needs_no_contraction(radius):
    """It is exact wherever both solves converge."""
    equation = tanh(3, 10, radius)
    incoming = torch.randn(3, 10).double()
    solver = BroydenSolver(max_steps=300, tol=1e-13)
    out, solution = ImplicitGradient(solver)(equation, start_of(equation), solver)
    assert solution.converged.all()
    slope = 1 - solution.value.square()
    w = equation.tensors[0].detach()
    eye = torch.eye(10).double()
    y = torch.stack(
        [
            torch.linalg.solve(eye - (slope[i][:, None] * w).T, incoming[i])
            for i in range(3)
        ]
    )
    found = grads_of(equation, out, incoming)
    assert relative(found[1], y * slope) < 1e-9
    assert relative(found[0], (y * slope).T @ solution.value) < 1e-9


def test_finite_differences():
    equation = tanh(2, 4)
    w, x = equation.tensors
    gradient = ImplicitGradient(exact)

    def loss(w, x):
        bound = equation.bind((w, x))
        out, _ = gradient(bound, start_of(equation), exact)
        return out.square().sum()

    assert torch.autograd.gradcheck(loss, (w, x), eps=1e-5, atol=1e-7)


@every_gradient
def test_output_and_solution(name):
    """f(z*) goes on, z* is what the solution describes."""
    gradient, recompute = gradient_of(name, steps=6)
    equation = tanh(3, 5, recompute=recompute)
    solver = BroydenSolver(max_steps=4, tol=0)
    out, solution = gradient(equation, start_of(equation), solver)
    assert out.requires_grad
    assert not solution.value.requires_grad
    z = equation(solution.value)
    residual = (z - solution.value).norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(solution.residual, residual.detach())
    if name.startswith('phantom unrolled'):
        z = solution.value
        for _ in range(6):
            z = equation(z)
    torch.testing.assert_close(out, z, rtol=1e-12, atol=1e-14)
    assert solution.adjoint is None


@every_gradient
def test_without_gradients(name):
    gradient, recompute = gradient_of(name, steps=6)
    equation = tanh(3, 5, recompute=recompute)
    with torch.no_grad():
        out, _ = gradient(equation, start_of(equation), exact)
    assert not out.requires_grad
    expected, _ = gradient(equation, start_of(equation), exact)
    assert torch.equal(out, expected)


@every_gradient
def test_some_tensors_need_no_gradient(name):
    gradient, recompute = gradient_of(name, steps=100)
    equation = tanh(3, 5, recompute=recompute)
    incoming = torch.randn(3, 5).double()
    expected = dense(equation, incoming)
    w, x = (t.detach().clone() for t in equation.tensors)
    for i in range(2):
        tensors = [w.clone(), x.clone()]
        tensors[i].requires_grad_()
        out, _ = gradient(equation.bind(tensors), start_of(equation), exact)
        out.backward(incoming)
        assert relative(tensors[i].grad, expected[i]) < 1e-9
        assert tensors[1 - i].grad is None
    out, _ = gradient(equation.bind([w, x]), start_of(equation), exact)
    assert not out.requires_grad


@every_gradient
def test_tensors_that_are_not_used_or_are_integers(name):
    gradient, recompute = gradient_of(name, steps=5)
    unused = torch.ones(3).double().requires_grad_()
    index = torch.tensor([2, 0, 1])
    w = matrix(4, 0.5).requires_grad_()
    table = torch.randn(3, 4).double().requires_grad_()
    equation = Equation(
        lambda z, t: torch.tanh(z @ t[0].T + t[2][t[3]]),
        (w, unused, table, index),
        (False, False, False, True),
        recompute,
    )
    out, _ = gradient(equation, torch.zeros(3, 4).double(), exact)
    out.sum().backward()
    assert unused.grad is None or unused.grad.eq(0).all()
    assert w.grad.abs().sum() > 0
    assert table.grad.abs().sum() > 0


@every_gradient
def test_an_f_that_ignores_its_state(name):
    gradient, recompute = gradient_of(name, steps=5)
    x = torch.randn(3, 4).double().requires_grad_()
    equation = Equation(lambda z, t: torch.sin(t[0]), (x,), (True,), recompute)
    out, solution = gradient(equation, torch.zeros(3, 4).double(), exact)
    out.sum().backward()
    assert solution.residual.max() < 1e-12
    torch.testing.assert_close(x.grad, x.detach().cos())


@every_gradient
def test_two_backward_passes_through_one_output(name):
    gradient, recompute = gradient_of(name, steps=100)
    equation = tanh(3, 5, recompute=recompute)
    incoming = torch.randn(3, 5).double()
    out, _ = gradient(equation, start_of(equation), exact)
    first = torch.autograd.grad(out, equation.tensors, incoming, retain_graph=True)
    second = torch.autograd.grad(out, equation.tensors, 2 * incoming)
    for a, b in zip(first, second, strict=True):
        assert relative(b, 2 * a) < 1e-9


@pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' not in n])
def test_second_derivatives_are_refused(name):
    """A gradient penalty would silently be a constant."""
    gradient, recompute = gradient_of(name, steps=5)
    equation = tanh(3, 5, recompute=recompute)
    w = equation.tensors[0]
    out, _ = gradient(equation, start_of(equation), exact)
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(out.square().sum(), w, create_graph=True)


@pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' in n])
def test_second_derivatives_of_iterations_are_exact(name):
    gradient, recompute = gradient_of(name, steps=3)
    equation = tanh(3, 5, recompute=recompute)
    w = equation.tensors[0]
    out, solution = gradient(equation, start_of(equation), exact)

    def penalty(out):
        (grad,) = torch.autograd.grad(out.square().sum(), w, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), w)[0]

    z = start_of(equation) if name.startswith('unrolled') else solution.value
    for _ in range(3):
        z = equation(z)
    assert relative(penalty(out), penalty(z)) < 1e-12


class TestScale:
    """A loss scaled for mixed precision scales gradients, and nothing else."""

    @every_gradient
    @pytest.mark.parametrize('scale', [1e-30, 1e-12, 1e12, 1e30])
    def test_gradients_scale_with_the_loss(self, name, scale):
        gradient, recompute = gradient_of(name, steps=10)
        equation = tanh(3, 5, dtype=torch.float32, recompute=recompute)
        solver = BroydenSolver(max_steps=40, tol=1e-6)
        if isinstance(gradient, ImplicitGradient):
            gradient = ImplicitGradient(solver)
        incoming = torch.randn(3, 5)
        out, solution = gradient(equation, start_of(equation), solver)
        plain = torch.autograd.grad(out, equation.tensors, incoming, retain_graph=True)
        adjoint = solution.adjoint
        scaled = torch.autograd.grad(out, equation.tensors, scale * incoming)
        for a, b in zip(scaled, plain, strict=True):
            assert relative(a.double() / scale, b.double()) < 1e-5
        if adjoint is not None:
            assert torch.equal(adjoint.steps, solution.adjoint.steps)

    @pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' not in n])
    def test_each_sample_has_its_own_scale(self, name):
        gradient, recompute = gradient_of(name, steps=10)
        equation = tanh(4, 5, dtype=torch.float32, recompute=recompute)
        incoming = torch.randn(4, 5)
        scale = torch.tensor([1e-30, 1.0, 1e30, 1e-10])[:, None]
        solver = BroydenSolver(max_steps=40, tol=1e-6)
        out, _ = gradient(equation, start_of(equation), solver)
        plain = torch.autograd.grad(out, equation.tensors, incoming, retain_graph=True)
        scaled = torch.autograd.grad(out, equation.tensors, scale * incoming)
        for i in range(4):
            found = scaled[1][i].double() / scale[i]
            assert relative(found, plain[1][i].double()) < 1e-4

    @every_gradient
    def test_zero_gives_zero(self, name):
        gradient, recompute = gradient_of(name, steps=10)
        equation = tanh(3, 5, recompute=recompute)
        out, solution = gradient(equation, start_of(equation), exact)
        for found in grads_of(equation, out, torch.zeros(3, 5).double()):
            assert found.eq(0).all()
        if 'implicit' in name:
            assert solution.adjoint.status.eq(Status.CONVERGED).all()

    @every_gradient
    def test_zero_for_one_sample(self, name):
        gradient, recompute = gradient_of(name, steps=100)
        equation = tanh(3, 5, recompute=recompute)
        incoming = torch.randn(3, 5).double()
        incoming[1] = 0
        out, _ = gradient(equation, start_of(equation), exact)
        found = grads_of(equation, out, incoming)
        for a, b in zip(found, dense(equation, incoming), strict=True):
            assert relative(a, b) < 1e-9
        assert found[1][1].eq(0).all()


class TestWeightsOfF:
    """Normalised weights are evaluated once, outside of the solve."""

    class F(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = weight_norm(torch.nn.Linear(4, 4))

        def forward(self, maps, x):
            return [torch.tanh(self.layer(maps[0]) + x)]

    def layer(self, name):
        gradient, recompute = gradient_of(name, steps=30)
        f = self.F().double()
        with torch.no_grad():
            f.layer.parametrizations.weight.original0.mul_(0.5)
        solver = dict(type='BroydenSolver', max_steps=60, tol=1e-13)
        return EquilibriumLayer(f, solver, gradient, recompute=recompute)

    @every_gradient
    @pytest.mark.parametrize('first', ['no_grad', 'eval', 'nothing'])
    def test_all_of_them_get_their_gradient(self, name, first):
        torch.manual_seed(1)
        layer = self.layer(name)
        start, x = [torch.zeros(3, 4).double()], torch.randn(3, 4).double()
        if first == 'no_grad':
            with torch.no_grad():
                layer(start, x)
        elif first == 'eval':
            layer.eval()(start, x)
            layer.train()
        incoming = torch.randn(3, 4).double()
        layer(start, x)[0].backward(incoming)
        found = {n: p.grad for n, p in layer.f.named_parameters()}
        assert {'original0', 'original1'} <= {n.split('.')[-1] for n in found}

        z = start
        for _ in range(200):
            z = layer.f(z, x)
        expected = torch.autograd.grad(z[0], list(layer.f.parameters()), incoming)
        for (parameter, grad), reference in zip(found.items(), expected, strict=True):
            assert grad is not None, parameter
            assert relative(grad, reference) < 1e-6, parameter

    @pytest.mark.parametrize('with_cp', [False, True])
    @pytest.mark.parametrize(
        'gradient',
        [
            dict(type='ImplicitGradient'),
            dict(type='PhantomGradient', steps=2),
            dict(type='PhantomGradient', steps=2, unroll=True),
            dict(type='UnrolledGradient', steps=2),
        ],
        ids=str,
    )
    def test_of_a_backbone(self, gradient, with_cp):
        model = project_classifier(gradient=gradient, with_cp=with_cp).train()
        images = torch.randn(2, 3, 14, 11).double()
        with torch.no_grad():
            model.backbone(images)
        maps = model.backbone(images)
        sum(m.square().sum() + m.sum() for m in maps).backward()
        names = dict(model.backbone.named_parameters())
        normalised = [n for n in names if n.endswith(('original0', 'original1'))]
        # Two convolutions a block and one after the fusion, of three branches.
        assert len(normalised) == 2 * 9
        for name, parameter in names.items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


class TestGradientsOfSeveralPasses:
    def test_accumulate(self):
        equation = tanh(3, 5)
        incoming = torch.randn(3, 5).double()
        for _ in range(2):
            out, _ = ImplicitGradient(exact)(equation, start_of(equation), exact)
            out.backward(incoming)
        for tensor, b in zip(equation.tensors, dense(equation, incoming), strict=True):
            assert relative(tensor.grad, 2 * b) < 1e-9

    def test_in_any_order(self):
        one, two = tanh(3, 5), tanh(2, 7)
        incoming = torch.randn(3, 5).double()
        out_one, _ = ImplicitGradient(exact)(one, start_of(one), exact)
        out_two, _ = ImplicitGradient(exact)(two, start_of(two), exact)
        out_one.backward(incoming)
        out_two.sum().backward()
        for tensor, b in zip(one.tensors, dense(one, incoming), strict=True):
            assert relative(tensor.grad, b) < 1e-9


@every_gradient
def test_nothing_is_accumulated_by_a_backward_inside(name):
    """Gradients are returned: hooks on the tensors see them, once each."""
    gradient, recompute = gradient_of(name, steps=10)
    equation = tanh(3, 5, recompute=recompute)
    calls = []
    leaves = equation.tensors
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda t: calls.append(id(t)))
    out, _ = gradient(equation, start_of(equation), exact)
    torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert all(leaf.grad is None for leaf in leaves)
    assert calls == []
    out.sum().backward()
    assert sorted(calls) == sorted(map(id, leaves))


@every_solver
def test_forward_and_backward_solvers_are_independent(kind):
    equation = tanh(3, 6)
    incoming = torch.randn(3, 6).double()
    backward = kind(max_steps=300, tol=1e-12)
    out, solution = ImplicitGradient(backward)(equation, start_of(equation), exact)
    found = grads_of(equation, out, incoming)
    assert solution.adjoint.converged.all()
    for a, b in zip(found, dense(equation, incoming), strict=True):
        assert relative(a, b) < 1e-9


def test_a_gradient_of_ones_own_says_what_it_needs():
    @GRADIENT_REGISTRY.register_module()
    class Picky(Gradient):
        def check(self, solver):
            if not isinstance(solver, BroydenSolver):
                raise ValueError(f'solver={solver} has no history: use BroydenSolver')

    f = torch.nn.Identity()
    try:
        for gradient in (Picky(), dict(type='Picky')):
            EquilibriumLayer(f, dict(type='BroydenSolver'), gradient)
            with pytest.raises(ValueError, match=r'solver=Picard.*use BroydenSolver'):
                EquilibriumLayer(f, dict(type='PicardSolver'), gradient)
    finally:
        GRADIENT_REGISTRY.module_dict.pop('Picky')
    with pytest.raises(NotImplementedError):
        Gradient()(None, None, None)


def test_inexact_solves_still_give_a_descent_direction():
    """Two steps each way are crude, and still point downhill."""
    equation = tanh(4, 8, radius=0.6)
    incoming = torch.randn(4, 8).double()
    rough = BroydenSolver(max_steps=3, tol=1e-3)
    out, _ = ImplicitGradient(rough)(equation, start_of(equation), rough)
    assert cosine(grads_of(equation, out, incoming), dense(equation, incoming)) > 0.9
    for gradient in (PhantomGradient(2), UnrolledGradient(4)):
        out, _ = gradient(equation, start_of(equation), rough)
        assert (
            cosine(grads_of(equation, out, incoming), dense(equation, incoming)) > 0.8
        )
