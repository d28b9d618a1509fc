import pytest
import torch

from mdeq_mm.implicit import Status, UnrolledGradient
from tests.helpers import relative, tanh


def plain(equation, z, steps, damping):
    for _ in range(steps):
        before, z = z, (1 - damping) * z + damping * equation(z)
    return before, z


@pytest.mark.parametrize('steps', [1, 2, 7])
@pytest.mark.parametrize('damping', [1.0, 0.4])
@pytest.mark.parametrize('recompute', [False, True])
def test_is_a_plain_loop(steps, damping, recompute):
    equation = tanh(3, 6, radius=1.5, recompute=recompute)
    start = torch.randn(3, 6).double()
    incoming = torch.randn(3, 6).double()
    out, solution = UnrolledGradient(steps, damping)(equation, start)
    before, expected = plain(equation, start, steps, damping)
    assert relative(out, expected) < 1e-13
    assert relative(solution.value, before) < 1e-13 or steps == 1
    for a, b in zip(
        torch.autograd.grad(out, equation.tensors, incoming),
        torch.autograd.grad(expected, equation.tensors, incoming),
        strict=True,
    ):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize('damping', [1.0, 0.4])
def test_the_solution_describes_the_iterate_before_the_last(damping):
    equation = tanh(3, 6)
    start = torch.randn(3, 6).double()
    _, solution = UnrolledGradient(5, damping)(equation, start)
    before, _ = plain(equation, start, 5, damping)
    torch.testing.assert_close(solution.value, before.detach())
    fz = equation(before)
    expected = (fz - before).norm(dim=1) / fz.norm(dim=1)
    torch.testing.assert_close(solution.residual, expected.detach())
    assert solution.steps.tolist() == [5, 5, 5]
    assert solution.status.eq(Status.MAX_STEPS).all()
    assert solution.status.dtype == solution.steps.dtype == torch.int64
    assert not solution.value.requires_grad


def test_a_start_that_is_not_finite_is_replaced():
    equation = tanh(3, 6)
    start = torch.zeros(3, 6).double()
    start[1, 0] = torch.nan
    out, solution = UnrolledGradient(4)(equation, start)
    expected, _ = UnrolledGradient(4)(equation, torch.zeros(3, 6).double())
    assert torch.equal(out, expected)
    assert solution.status.eq(Status.MAX_STEPS).all()


def test_it_says_that_it_iterates_itself():
    assert UnrolledGradient().iterates


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(steps=0), ValueError, 'steps=0 .*1 or more'),
        (dict(steps='5'), TypeError, "steps must be an integer, got '5'"),
        (dict(damping=-0.5), ValueError, 'damping=-0.5'),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        UnrolledGradient(**arguments)
