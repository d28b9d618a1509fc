import math

import pytest
import torch

from mdeq_mm.implicit import BroydenSolver, PhantomGradient, Status
from tests.helpers import relative, tanh

exact = BroydenSolver(80, 1e-13)


def run(equation, gradient, incoming):
    start = torch.zeros_like(equation.tensors[1]).detach()
    out, solution = gradient(equation, start, exact)
    return torch.autograd.grad(out, equation.tensors, incoming), solution


@pytest.mark.parametrize('steps', [1, 2, 5])
@pytest.mark.parametrize('damping', [1.0, 0.6])
@pytest.mark.parametrize('unroll', [False, True])
def test_against_the_series_with_dense_matrices(steps, damping, unroll):
    equation = tanh(3, 6)
    incoming = torch.randn(3, 6).double()
    found, solution = run(equation, PhantomGradient(steps, damping, unroll), incoming)
    z = solution.value
    w = equation.tensors[0].detach()
    slope = 1 - z.square()
    dw, dx = torch.zeros_like(w), torch.zeros_like(z)
    for i in range(3):
        jacobian = slope[i][:, None] * w
        factor = damping * jacobian.T + (1 - damping) * torch.eye(6).double()
        y = sum(torch.matrix_power(factor, k) @ incoming[i] for k in range(steps))
        dx[i] = damping * y * slope[i]
        dw += torch.outer(dx[i], z[i])
    assert relative(found[0], dw) < 1e-9
    assert relative(found[1], dx) < 1e-9


def test_one_term_is_the_jacobian_free_gradient():
    equation = tanh(3, 6)
    incoming = torch.randn(3, 6).double()
    found, solution = run(equation, PhantomGradient(1), incoming)
    expected = torch.autograd.grad(equation(solution.value), equation.tensors, incoming)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize('recompute', [False, True])
def test_both_forms_report(recompute):
    equation = tanh(3, 6, recompute=recompute)
    incoming = torch.randn(3, 6).double()
    _, series = run(equation, PhantomGradient(4), incoming)
    assert series.adjoint.steps.tolist() == [3, 3, 3]
    assert series.adjoint.status.eq(Status.MAX_STEPS).all()
    assert series.adjoint.residual.gt(0).all()
    _, longer = run(equation, PhantomGradient(20), incoming)
    assert (longer.adjoint.residual < series.adjoint.residual).all()
    _, unrolled = run(equation, PhantomGradient(4, unroll=True), incoming)
    assert unrolled.adjoint is None


def test_the_residual_is_that_of_the_adjoint_equation():
    equation = tanh(3, 6)
    incoming = torch.randn(3, 6).double()
    _, solution = run(equation, PhantomGradient(6), incoming)
    y = solution.adjoint.value
    z = solution.value.requires_grad_()
    direction = incoming / incoming.norm(dim=1, keepdim=True)
    (product,) = torch.autograd.grad(equation(z), z, y)
    # It is of the sum before the last term was added.
    expected = (product + direction - y).norm(dim=1) / y.norm(dim=1)
    (last,) = torch.autograd.grad(equation(z), z, product + direction - y)
    assert (solution.adjoint.residual >= expected * 0.99).all()
    assert last.isfinite().all()


def test_a_sample_that_fails_when_unrolled_is_reported():
    equation = tanh(3, 6)
    with torch.no_grad():
        equation.tensors[1][2] = torch.nan
    _, solution = run(
        equation, PhantomGradient(3, unroll=True), torch.ones(3, 6).double()
    )
    assert solution.status.tolist() == [0, 0, 3]
    assert solution.status.dtype == torch.int64


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(steps=0), ValueError, 'steps=0 .*1 or more'),
        (dict(steps=1.5), TypeError, 'steps must be an integer, got 1.5'),
        (dict(damping=0), ValueError, 'damping=0 .*0 < damping <= 1'),
        (dict(damping=1.1), ValueError, 'damping=1.1'),
        (dict(damping=math.nan), ValueError, 'damping=nan'),
        (dict(damping=None), ValueError, 'damping=None'),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        PhantomGradient(**arguments)
