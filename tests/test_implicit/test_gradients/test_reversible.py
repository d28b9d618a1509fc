import pytest
import torch

from mdeq_mm.implicit import Equation, ReversibleGradient, Status
from tests.helpers import relative, tanh
from tests.test_implicit.test_gradients.test_memory import bytes_of


def plain(equation, z, steps, beta):
    """The iteration as its formula has it, recorded as a whole."""
    y = z
    for _ in range(steps):
        y = (1 - beta) * y + beta * equation(z)
        before = z
        z = (1 - beta) * before + beta * equation(y)
    return y, z


@pytest.mark.parametrize('steps', [1, 2, 8])
@pytest.mark.parametrize('beta', [0.3, 0.5, 0.8])
@pytest.mark.parametrize('radius', [0.5, 1.5])
def test_gradient_is_that_of_the_iteration(steps, beta, radius):
    """Whether f is contractive or not."""
    equation = tanh(3, 6, radius)
    start = torch.randn(3, 6).double()
    incoming = torch.randn(3, 6).double()
    out, solution = ReversibleGradient(steps, beta)(equation, start)
    before, expected = plain(equation, start, steps, beta)
    assert relative(out, expected) < 1e-13
    assert relative(solution.value, before) < 1e-13
    for found, wanted in zip(
        torch.autograd.grad(out, equation.tensors, incoming),
        torch.autograd.grad(expected, equation.tensors, incoming),
        strict=True,
    ):
        # What a step back makes of a rounding.
        w = equation.tensors[0].detach()
        growth = (1 + beta * torch.linalg.matrix_norm(w, 2).item()) / (1 - beta)
        assert relative(found, wanted) < 1e-14 + 1e-16 * growth**steps


def test_solution_describes_the_last_evaluation():
    equation = tanh(3, 6)
    _, solution = ReversibleGradient(4, 0.5)(equation, torch.zeros(3, 6).double())
    fz = equation(solution.value).detach()
    expected = (fz - solution.value).norm(dim=1) / fz.norm(dim=1)
    torch.testing.assert_close(solution.residual, expected)
    assert solution.steps.tolist() == [8, 8, 8]
    assert solution.status.eq(Status.MAX_STEPS).all()
    assert not solution.value.requires_grad


def test_float32_f_with_a_state_in_double():
    """In single precision the way back would lose all digits."""
    exact = tanh(3, 6, radius=0.9)
    tensors = [t.detach().float().requires_grad_() for t in exact.tensors]

    def f(z, tensors):
        return torch.tanh(z.float() @ tensors[0].T + tensors[1]).to(z.dtype)

    incoming = torch.randn(3, 6)
    gradient = ReversibleGradient(8, 0.8)
    out, _ = gradient(Equation(f, tensors, (False, True)), torch.zeros(3, 6))
    assert out.dtype == torch.float32
    found = torch.autograd.grad(out, tensors, incoming)
    _, expected = plain(exact, torch.zeros(3, 6).double(), 8, 0.8)
    wanted = torch.autograd.grad(expected, exact.tensors, incoming.double())
    assert relative(found, wanted) < 1e-5


def test_the_start_is_stored_where_f_is_singular_at_it():
    """f(z) = W z/|z|: reconstructed zeros would point anywhere."""
    w = torch.randn(5, 5).double().requires_grad_()
    x = torch.randn(3, 5).double()

    def f(z, tensors):
        size = z.norm(dim=1, keepdim=True)
        return (z / size.clamp_min(1e-30)) @ tensors[0].T * 0.3 + tensors[1]

    equation = Equation(f, (w, x), (False, True))
    start = torch.zeros(3, 5).double()
    out, _ = ReversibleGradient(5, 0.5)(equation, start)
    _, expected = plain(equation, start, 5, 0.5)
    (found,) = torch.autograd.grad(out.square().sum(), w)
    (wanted,) = torch.autograd.grad(expected.square().sum(), w)
    assert relative(found, wanted) < 1e-10


def test_memory_does_not_grow_with_the_steps():
    found = {bytes_of(ReversibleGradient(k, 0.5), None) for k in (1, 5, 20)}
    assert len(found) == 1


@pytest.mark.parametrize('where', ['input', 'gradient'])
def test_a_failed_sample_takes_no_part(where):
    w = tanh(3, 6).tensors[0]
    x = torch.randn(3, 6).double().requires_grad_()
    rest = torch.tensor([0, 2])

    def run(x, incoming):
        equation = Equation(
            lambda z, t: torch.tanh(z @ t[0].T + t[1]), (w, x), (False, True)
        )
        start = torch.zeros(len(x), 6).double()
        out, solution = ReversibleGradient(3, 0.5)(equation, start)
        return out, solution, torch.autograd.grad(out, (w, x), incoming)

    incoming = torch.randn(3, 6).double()
    _, _, (expected_w, expected_x) = run(x[rest], incoming[rest])
    if where == 'input':
        bad = x.detach().clone()
        bad[1, 0] = torch.nan
        x = bad.requires_grad_()
    else:
        incoming[1, 0] = torch.inf
    out, solution, (found_w, found_x) = run(x, incoming)
    assert out.isfinite().all() and solution.value.isfinite().all()
    assert relative(found_w, expected_w) < 1e-13
    assert relative(found_x[rest], expected_x) < 1e-13
    assert found_x[1].eq(0).all()
    failed = solution.status == Status.DIVERGED
    assert failed.tolist() == [False, where == 'input', False]


def test_it_says_that_it_iterates_itself():
    assert ReversibleGradient().iterates


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(steps=0), ValueError, 'steps=0 .*1 or more'),
        (dict(steps=2.5), TypeError, 'steps must be an integer, got 2.5'),
        (dict(beta=1.0), ValueError, r'beta=1\.0 cannot be reversed'),
        (dict(beta=0), ValueError, 'beta=0 is out of range'),
        (dict(steps=13, beta=0.8), ValueError, r'lose 9\.1 digits .* at most 12 steps'),
        (dict(steps=30, beta=0.5), ValueError, r'lose 9\.0 digits .* at most 29 steps'),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        ReversibleGradient(**arguments)


@pytest.mark.parametrize(('steps', 'beta'), [(12, 0.8), (29, 0.5)])
def test_as_many_digits_as_allowed_are_not_refused(steps, beta):
    ReversibleGradient(steps, beta)
