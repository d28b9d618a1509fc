import pytest
import torch

from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    ImplicitGradient,
    PicardSolver,
    SharedInverseGradient,
    Status,
)
from tests.helpers import affine, cosine, relative, tanh

EXACT = ImplicitGradient(BroydenSolver(max_steps=60, tol=1e-13))


def gradients(gradient, equation, solver, incoming):
    out, solution = gradient(equation, torch.zeros_like(incoming), solver)
    return torch.autograd.grad(out, equation.tensors, incoming), solution


def inverse_of(solver, equation, start):
    """-B^-1, dense, of the pairs that a solve left."""
    _, state = solver.solve(equation, start, keep_state=True)
    steps, residuals, small = solver.history(state)
    eye = torch.eye(start.shape[1]).double()
    solved = torch.linalg.solve(small, steps)
    return eye + residuals.mT @ solved, (steps, residuals)


def test_the_history_is_an_inverse_along_the_steps():
    """The secant condition B s = g' - g for the last step of each sample."""
    equation, _ = affine(3, 6)
    minus_inverse, (steps, residuals) = inverse_of(
        BroydenSolver(6, tol=0), equation, torch.zeros(3, 6).double()
    )
    # One update a step: the residual it led to, over the step.
    b = -torch.linalg.inv(minus_inverse)
    lengths = steps.square().sum(2, keepdim=True)
    rebuilt = residuals.mT @ (steps / lengths) - torch.eye(6).double()
    assert relative(b, rebuilt) < 1e-9


@pytest.mark.parametrize('memory', [None, 3])
def test_estimate_is_the_transposed_inverse(memory):
    """Refined by one product: y = J' H' g + g, and its residual is told."""
    equation = tanh(3, 6, radius=0.6)
    solver = BroydenSolver(8, tol=0, memory=memory)
    incoming = torch.randn(3, 6).double()
    found, solution = gradients(
        SharedInverseGradient(fallback=None), equation, solver, incoming
    )
    minus_inverse, _ = inverse_of(solver, equation, torch.zeros(3, 6).double())
    w, x = equation.tensors
    z = solution.value
    slope = 1 - torch.tanh(z @ w.T + x).detach() ** 2
    jacobian = slope[:, :, None] * w.detach()
    estimate = torch.einsum('nij,ni->nj', minus_inverse, incoming)
    refined = torch.einsum('nij,ni->nj', jacobian, estimate) + incoming
    # The product with the Jacobian in x is the adjoint times the slope.
    assert relative(found[1], refined * slope) < 1e-10
    residual = (refined - estimate).norm(dim=1) / refined.norm(dim=1)
    torch.testing.assert_close(solution.adjoint.residual, residual)
    assert solution.adjoint.steps.tolist() == [1, 1, 1]


def test_a_full_history_gives_the_exact_gradient_of_an_affine_map():
    """As many independent steps as dimensions make the secants the Jacobian."""
    dim = 3
    equation, _ = affine(2, dim, radius=0.5)
    equation = equation.bind([t.requires_grad_() for t in equation.tensors])
    incoming = torch.randn(2, dim).double()
    # Broyden's method ends after 2 dim steps on a linear system (Gay 1979).
    solver = BroydenSolver(2 * dim + 2, tol=1e-14)
    found, solution = gradients(SharedInverseGradient(), equation, solver, incoming)
    expected, _ = gradients(EXACT, equation, solver, incoming)
    assert solution.adjoint.residual.max() < 0.5
    assert cosine(found, expected) > 0.99


@pytest.mark.parametrize('radius', [0.5, 0.95])
def test_the_fallback_solves_where_the_estimate_is_poor(radius):
    equation = tanh(4, 12, radius)
    incoming = torch.randn(4, 12).double()
    solver = BroydenSolver(40, tol=1e-10)
    exact = BroydenSolver(60, tol=1e-12)
    expected, _ = gradients(EXACT, equation, solver, incoming)
    found, solution = gradients(
        SharedInverseGradient(limit=1e-9, fallback=exact), equation, solver, incoming
    )
    assert solution.adjoint.converged.all()
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-9
    assert solution.adjoint.steps.min() > 1


def test_a_sample_that_finished_early_keeps_its_inverse():
    """It waits with steps of zero, which must not make its matrix singular."""
    equation = tanh(3, 6, radius=0.9)
    x = equation.tensors[1].detach().clone()
    # So small that the first sample is nearly linear, and its solve short.
    x[0] *= 1e-6
    equation = equation.bind((equation.tensors[0], x.requires_grad_()))
    solver = BroydenSolver(40, tol=1e-6)
    incoming = torch.randn(3, 6).double()
    gradient = SharedInverseGradient(fallback=None)
    (_, together), solution = gradients(gradient, equation, solver, incoming)
    assert solution.steps[0] != solution.steps[1:].max()
    for i in range(3):
        (_, alone), _ = gradients(
            gradient, equation.take([i]), solver, incoming[i : i + 1]
        )
        assert relative(together[i], alone[0]) < 1e-9


def test_zero_gradient_gives_zero():
    equation = tanh(3, 6)
    found, solution = gradients(
        SharedInverseGradient(), equation, BroydenSolver(10), torch.zeros(3, 6).double()
    )
    assert all(g.eq(0).all() for g in found)
    assert solution.adjoint.status.eq(Status.CONVERGED).all()


@pytest.mark.parametrize('solver', [PicardSolver(), AndersonSolver()], ids=repr)
def test_needs_broyden(solver):
    with pytest.raises(ValueError, match=f'solver is {type(solver).__name__}: use'):
        SharedInverseGradient().check(solver)
    SharedInverseGradient().check(BroydenSolver())


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(limit=0), ValueError, 'limit=0 is out of range'),
        (dict(limit=1.5), ValueError, 'limit=1.5'),
        (dict(fallback=dict(type='PicardSolver', norm='abs')), ValueError, "use 'rel'"),
        (dict(fallback=dict(type='Nothing')), ValueError, "fallback.type='Nothing'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        SharedInverseGradient(**arguments)
