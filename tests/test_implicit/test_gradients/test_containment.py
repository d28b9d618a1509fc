"""What is not finite in one sample stays there: in outputs and in all gradients."""

import pytest
import torch

from mdeq_mm.implicit import AndersonSolver, Equation, PhantomGradient, Status
from tests.helpers import GRADIENTS, SOLVERS, gradient_of, matrix, relative

N, DIM, BAD = 4, 5, 1
GOOD = [0, 2, 3]

every_gradient = pytest.mark.parametrize('name', GRADIENTS)
every_solver = pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)


def tanh(z, w, x, q):
    return torch.tanh(z @ w.T + x) * q


def root(z, w, x, q):
    """Not a number where q is negative, though all inputs are finite."""
    return torch.tanh(z @ w.T + x) * q.sqrt()


def logarithm(z, w, x, q):
    """Finite at zero, and not a number farther away, where q is negative."""
    inside = 100.1 + 100 * q - z.square().sum(1, keepdim=True)
    return (
        torch.tanh(z @ w.T + x) + 0.01 * torch.where(q > 0, inside, inside - 1e-2).log()
    )


def edge(z, w, x, q):
    """Has an infinite derivative where z = q."""
    return torch.tanh(z @ w.T + x) + 0.1 * (z - q).abs().sqrt()


def cusp(z, w, x, q):
    """The same, where the derivative passes through the shared weights too."""
    return 0.1 * (z @ w.T + x).abs().sqrt() * q


def kink(z, w, x, q):
    """Has an infinite derivative in an input alone, where that is zero."""
    return torch.tanh(z @ w.T + x) + 0.1 * q.abs().sqrt()


def weighted(z, w, x, q):
    """Has no derivative in the shared weights where q is zero."""
    return torch.tanh(z @ w.T + x) + 0.1 * (w.square().sum() * q).sqrt()


def problem(function, spoil=None):
    """Tensors w, x, q of a batch whose second sample is spoilt."""
    torch.manual_seed(3)
    w = matrix(DIM, 0.7)
    x = torch.randn(N, DIM).double()
    if function is cusp:
        x = x.abs() + 2
    q = torch.ones(N, 1).double() * (5 if function is edge else 1)
    if spoil is not None:
        spoil(x, q)
    return w, x, q


def run(name, kind, function, tensors, incoming=None):
    """Output, solution and gradients of one pass forward and backward."""
    gradient, recompute = gradient_of(name, steps=25)
    w, x, q = (t.clone().requires_grad_() for t in tensors)
    equation = Equation(
        lambda z, t: function(z, *t), (w, x, q), (False, True, True), recompute
    )
    start = torch.zeros(len(x), DIM).double()
    solver = kind(max_steps=100, tol=1e-13)
    out, solution = gradient(equation, start, solver)
    if incoming is None:
        incoming = torch.linspace(-1, 2, DIM).double().expand_as(out) + out.detach()
    out.backward(incoming)
    return out.detach(), solution, (w.grad, x.grad, q.grad)


def compare(name, kind, function, spoil, shared=True):
    """The batch with the bad sample against the batch without it."""
    tensors = w, x, q = problem(function, spoil)
    out, solution, (dw, dx, dq) = run(name, kind, function, tensors)
    without = (w, x[GOOD], q[GOOD])
    clean_out, _, (clean_dw, clean_dx, clean_dq) = run(name, kind, function, without)

    assert out.isfinite().all()
    assert solution.value.isfinite().all()
    for found in (dw, dx, dq):
        assert found.isfinite().all()
    assert relative(out[GOOD], clean_out) < 1e-10
    assert relative(dx[GOOD], clean_dx) < 1e-10
    assert relative(dq[GOOD], clean_dq) < 1e-10
    if shared:
        assert relative(dw, clean_dw) < 1e-10
        assert dx[BAD].eq(0).all()
        assert dq[BAD].eq(0).all()
    return solution


@every_gradient
@every_solver
@pytest.mark.parametrize('value', [torch.nan, torch.inf], ids=str)
def test_inputs(name, kind, value):
    def spoil(x, q):
        x[BAD, 2] = value
        # With infinity, tanh is finite again: only the input is not.

    solution = compare(name, kind, tanh, spoil)
    if value != value:
        assert solution.status[BAD] == Status.DIVERGED
        assert solution.residual[BAD].isinf()


@every_gradient
@every_solver
def test_forward_solve(name, kind):
    def spoil(x, q):
        q[BAD] = -1

    solution = compare(name, kind, root, spoil)
    assert solution.status[BAD] == Status.DIVERGED


@every_gradient
@every_solver
def test_later_in_the_forward_solve(name, kind):
    def spoil(x, q):
        q[BAD] = -1.001

    # The best iterate is that before, where f is finite: it may contribute.
    solution = compare(name, kind, logarithm, spoil, shared=False)
    assert solution.status[BAD] == Status.DIVERGED


@every_gradient
@every_solver
def test_products_in_the_backward_pass(name, kind):
    def spoil(x, q):
        x[BAD] = 0
        q[BAD] = 0

    # Through an iteration, the steps after the infinite derivative contribute.
    solution = compare(name, kind, edge, spoil, shared='unrolled' not in name)
    if 'unrolled' not in name:
        assert solution.adjoint.status[BAD] == Status.DIVERGED
        assert solution.adjoint.value.isfinite().all()


@pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' not in n])
@every_solver
def test_products_that_pass_through_shared_weights(name, kind):
    def spoil(x, q):
        x[BAD] = 0

    solution = compare(name, kind, cusp, spoil)
    assert solution.converged[BAD]
    assert solution.adjoint.status[BAD] == Status.DIVERGED


@pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' not in n])
@every_solver
def test_derivative_in_the_shared_weights(name, kind):
    def spoil(x, q):
        q[BAD] = 0

    solution = compare(name, kind, weighted, spoil)
    assert solution.converged[BAD]


@pytest.mark.parametrize('function', [weighted, cusp])
def test_derivative_without_any_product_in_z(function):
    """The Jacobian-free gradient looks at no product before the full one."""

    def spoil(x, q):
        (q if function is weighted else x)[BAD] = 0

    grads = {}
    for rows in (range(N), GOOD):
        w, x, q = (t.requires_grad_() for t in problem(function, spoil))
        fixed = (w, x[rows], q[rows])
        equation = Equation(lambda z, t: function(z, *t), fixed, (False, True, True))
        start = torch.zeros(len(rows), DIM).double()
        out, _ = PhantomGradient(steps=1)(equation, start, AndersonSolver(100, 1e-13))
        out.square().sum().backward()
        grads[len(rows)] = w.grad
    assert relative(grads[N], grads[len(GOOD)]) < 1e-10


def test_float16_leaves_overflow_to_the_loss_scaler():
    w = torch.ones((), dtype=torch.float16, requires_grad=True)
    equation = Equation(
        lambda z, t: 0.1 * z + (t[0] * t[1]).float(),
        (w, torch.full((2, 1), 60000.0, dtype=torch.float16)),
        (False, True),
    )
    assert equation.half
    out, _ = PhantomGradient(steps=1)(equation, torch.zeros(2, 1), AndersonSolver())
    out.backward(torch.full_like(out, 4.0))
    assert w.grad.isinf()


@every_gradient
@every_solver
def test_derivative_in_an_input(name, kind):
    """It would go on to the weights of whatever made the input."""

    def spoil(x, q):
        q[BAD] = 0

    compare(name, kind, kink, spoil, shared=False)


@every_gradient
@every_solver
@pytest.mark.parametrize('value', [torch.nan, -torch.inf], ids=str)
def test_incoming_gradient(name, kind, value):
    tensors = w, x, q = problem(tanh)
    incoming = torch.randn(N, DIM).double()
    clean = incoming.clone()
    incoming[BAD, 3] = value
    _, _, (dw, dx, dq) = run(name, kind, tanh, tensors, incoming)
    without = (w, x[GOOD], q[GOOD])
    _, _, (clean_dw, clean_dx, clean_dq) = run(name, kind, tanh, without, clean[GOOD])
    assert relative(dw, clean_dw) < 1e-10
    assert relative(dx[GOOD], clean_dx) < 1e-10
    assert relative(dq[GOOD], clean_dq) < 1e-10
    assert dx[BAD].eq(0).all()
    assert dq[BAD].eq(0).all()


@every_gradient
@pytest.mark.parametrize('function', [tanh, cusp])
def test_no_sample_is_left(name, function):
    """All samples fail: zero gradients, and finite features for the head."""

    def spoil(x, q):
        x[:] = torch.nan

    tensors = problem(function, spoil)
    out, solution, grads = run(name, SOLVERS['broyden'], function, tensors)
    assert out.eq(0).all()
    assert solution.status.eq(Status.DIVERGED).all()
    for found in grads:
        assert found.eq(0).all()


@every_gradient
def test_shared_weights_that_are_not_finite(name):
    """Then every sample fails; the gradient is zero and not NaN."""
    w, x, q = problem(tanh)
    w[0, 0] = torch.nan
    out, solution, grads = run(name, SOLVERS['anderson'], tanh, (w, x, q))
    assert out.isfinite().all()
    assert solution.status.eq(Status.DIVERGED).all()
    assert all(g is None or not g.isnan().any() for g in grads)


@every_gradient
def test_two_bad_samples_of_different_kinds(name):
    def function(z, w, x, q):
        return torch.tanh(z @ w.T + x) * q.sqrt() + 0.1 * (z - 5 * q).abs().sqrt()

    w, x, q = problem(function)
    q[1] = -1
    x[2, 0] = torch.nan
    good = [0, 3]
    _, _, (dw, dx, _) = run(name, SOLVERS['broyden'], function, (w, x, q))
    _, _, (clean_dw, clean_dx, _) = run(
        name, SOLVERS['broyden'], function, (w, x[good], q[good])
    )
    assert relative(dw, clean_dw) < 1e-10
    assert relative(dx[good], clean_dx) < 1e-10
    assert dx[[1, 2]].eq(0).all()
