import pytest
import torch

from mdeq_mm.implicit import BroydenSolver, ImplicitGradient, Status
from tests.helpers import SOLVERS, relative, tanh


def start_of(equation):
    return torch.zeros_like(equation.tensors[1]).detach()


def test_the_adjoint_is_reported():
    equation = tanh(3, 6)
    forward, backward = BroydenSolver(60, 1e-12), BroydenSolver(7, 0)
    out, solution = ImplicitGradient(backward)(equation, start_of(equation), forward)
    assert solution.adjoint is None
    out.sum().backward()
    adjoint = solution.adjoint
    assert adjoint.steps.tolist() == [7, 7, 7]
    assert adjoint.status.eq(Status.MAX_STEPS).all()
    assert not adjoint.value.requires_grad


def test_the_adjoint_solves_its_equation():
    equation = tanh(3, 6)
    incoming = torch.randn(3, 6).double()
    solver = BroydenSolver(60, 1e-12)
    out, solution = ImplicitGradient(solver)(equation, start_of(equation), solver)
    out.backward(incoming)
    z = solution.value.requires_grad_()
    direction = incoming / incoming.norm(dim=1, keepdim=True)
    y = solution.adjoint.value
    (product,) = torch.autograd.grad(equation(z), z, y)
    assert relative(product + direction, y) < 1e-10


@pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)
def test_drops_finished_samples_if_told(kind):
    """The products with J' are over all samples, so that nothing can leave."""
    equation = tanh(5, 6, radius=0.9)
    incoming = torch.randn(5, 6).double()
    grads = []
    for drop in (None, False):
        solver = kind(100, 1e-12, drop_finished=drop)
        out, _ = ImplicitGradient(solver)(
            equation, start_of(equation), BroydenSolver(80, 1e-13)
        )
        grads.append(torch.autograd.grad(out, equation.tensors, incoming))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_defaults():
    solver = ImplicitGradient().solver
    assert isinstance(solver, BroydenSolver)
    assert solver.norm == 'rel'
    assert solver.tol <= 1e-5


def test_only_relative_solves_are_taken():
    solver = dict(type='BroydenSolver', norm='abs')
    with pytest.raises(ValueError, match=r"solver.norm='abs' .*use 'rel'"):
        ImplicitGradient(solver)


@pytest.mark.parametrize(
    ('solver', 'error', 'words'),
    [
        (dict(type='Newton'), ValueError, "solver.type='Newton' .*Broyden"),
        (dict(type='PicardSolver', tol=-1), ValueError, 'tol=-1'),
        (
            dict(type='PicardSolver', beta=1),
            TypeError,
            r'solver \(PicardSolver\) has no argument beta: .*max_steps',
        ),
        ('BroydenSolver', TypeError, "solver must be a dict.*'BroydenSolver'"),
    ],
    ids=str,
)
def test_bad_solvers_are_refused(solver, error, words):
    with pytest.raises(error, match=words):
        ImplicitGradient(solver)
