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


class TestWarmStart:
    def passes(self, equation, cotangents, **options):
        """Evaluations and gradients of consecutive backward passes."""
        gradient = ImplicitGradient(
            BroydenSolver(60, 1e-10), warm_start=options.pop('warm_start', True)
        )
        found = []
        for cotangent in cotangents:
            out, solution = gradient(
                equation, torch.zeros_like(cotangent), BroydenSolver(60, 1e-12)
            )
            grads = torch.autograd.grad(out, equation.tensors, cotangent)
            found.append((solution.adjoint.steps.max().item(), grads))
        return found

    def test_the_same_again_takes_no_time_and_gives_the_same(self):
        equation = tanh(3, 20)
        cotangent = torch.randn(3, 20).double()
        # Scale does not matter: the solve runs on unit gradients.
        first, second = self.passes(equation, [cotangent, 5 * cotangent])
        assert first[0] > 5 and second[0] == 1
        for one, two in zip(first[1], second[1], strict=True):
            torch.testing.assert_close(5 * one, two, rtol=1e-8, atol=1e-10)

    def test_similar_gradients_take_less(self):
        equation = tanh(3, 20)
        cotangent = torch.randn(3, 20).double()
        near = cotangent + 1e-6 * torch.randn(3, 20).double()
        first, second = self.passes(equation, [cotangent, near])
        cold = self.passes(equation, [cotangent, near], warm_start=False)
        assert second[0] < first[0]
        assert cold[1][0] == pytest.approx(cold[0][0], abs=1)
        for one, two in zip(second[1], cold[1][1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)

    def test_other_shapes_start_anew(self):
        gradient = ImplicitGradient(BroydenSolver(60, 1e-10), warm_start=True)
        for n in (3, 2):
            equation = tanh(n, 20)
            out, solution = gradient(
                equation, torch.zeros(n, 20).double(), BroydenSolver(60, 1e-12)
            )
            out.sum().backward()
            assert solution.adjoint.steps.min() > 3

    def test_a_failed_adjoint_is_not_started_from(self):
        equation = tanh(3, 20)
        gradient = ImplicitGradient(BroydenSolver(60, 1e-10), warm_start=True)
        cotangent = torch.randn(3, 20).double()
        gradient._last = (1e30 * cotangent, torch.tensor([2.0, torch.inf, 1.0]))
        out, solution = gradient(
            equation, torch.zeros_like(cotangent), BroydenSolver(60, 1e-12)
        )
        (out * cotangent).sum().backward()
        assert solution.adjoint.converged.all()
