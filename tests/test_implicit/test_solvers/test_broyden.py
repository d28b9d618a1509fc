import pytest
import torch

from mdeq_mm.implicit import BroydenSolver, Equation, Status
from tests.helpers import (
    Stretched,
    affine,
    equation_of,
    matrix,
    project_classifier,
    project_golden,
    tanh,
)


def iterates(solver, equation, start):
    """All states at which a solver evaluates f."""
    seen = []

    def watched(z):
        seen.append(z.clone())
        return equation(z)

    solver.solve(watched, start)
    return seen


def textbook(equation, start, steps, memory=None):
    """Broyden's good method on one sample, with a dense inverse.

    The inverse Jacobian gets a rank-one update a step (Sherman and Morrison). It
    starts from -I, and again once ``memory`` updates were made and used.
    """
    z = start[0].clone()
    inverse, updates, out, previous = -torch.eye(len(z)).double(), 0, [], None
    for _ in range(steps):
        out.append(z)
        g = equation(z[None])[0] - z
        if previous is not None:
            s, y = previous[0], g - previous[1]
            hy = inverse @ y
            inverse = inverse + torch.outer(s - hy, s @ inverse) / (s @ hy)
            updates += 1
        step = -inverse @ g
        previous = (step, g)
        if memory is not None and updates == memory:
            # The next step starts anew, so that this one leads to no update.
            inverse, updates, previous = -torch.eye(len(z)).double(), 0, None
        z = z + step
    return out


@pytest.mark.parametrize('dim', [1, 2, 6])
def test_iterates_are_those_of_a_dense_inverse(dim):
    w = matrix(dim, 0.9)
    equation = Equation(lambda z, t: torch.sin(z @ w.T) + 0.5)
    start = torch.randn(4, dim).double()
    found = iterates(BroydenSolver(8, 0), equation, start)
    for i in range(4):
        expected = textbook(equation, start[i : i + 1], 8)
        for a, b in zip(found, expected, strict=True):
            if (equation(b[None]) - b).norm() < 1e-10:
                break
            torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('memory', [1, 2, 3, 5])
def test_limited_memory_is_the_dense_inverse_started_anew(memory):
    w = matrix(9, 0.9)
    equation = Equation(lambda z, t: torch.sin(z @ w.T) + 0.5)
    start = torch.randn(3, 9).double()
    found = iterates(BroydenSolver(16, 0, memory=memory), equation, start)
    for i in range(3):
        expected = textbook(equation, start[i : i + 1], 16, memory)
        for a, b in zip(found, expected, strict=True):
            if (equation(b[None]) - b).norm() < 1e-9:
                break
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-10)


def test_secant_condition():
    """The next step takes the newest residual change into account exactly."""
    equation = tanh(1, 5)
    with torch.no_grad():
        z0 = torch.randn(1, 5).double()
        z1 = equation(z0)
        g0, g1 = z1 - z0, equation(z1) - z1
        s, y = z1 - z0, g1 - g0
        # B1 = -I + (y + s) s' / s's
        b = -torch.eye(5).double() + torch.outer((y + s)[0], s[0]) / (s * s).sum()
        torch.testing.assert_close(b @ s[0], y[0])
        expected = z1[0] - torch.linalg.solve(b, g1[0])
    found = iterates(BroydenSolver(3, 0), equation, z0)
    torch.testing.assert_close(found[2][0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g0, s)


@pytest.mark.parametrize('dim', [1, 2, 5])
@pytest.mark.parametrize('radius', [0.7, 3.0])
def test_linear_problems_end_after_twice_the_dimension(dim, radius):
    """Gay 1979; contractive or not."""
    equation, expected = affine(2, dim, radius)
    solver = BroydenSolver(2 * dim + 2, 1e-7, norm='abs')
    solution = solver.solve(equation, torch.zeros_like(expected), trace=True)
    assert solution.converged.all(), solution.trace
    torch.testing.assert_close(solution.value, expected, rtol=1e-5, atol=1e-5)


class TestHardMap:
    """f(z* + factor (z - z*)) of a real map: its spectral radius is 0.95."""

    @pytest.fixture
    def hard(self):
        golden = project_golden()
        backbone = project_classifier().backbone
        equation, start = equation_of(backbone, golden['input'].double())
        value = torch.cat([m.flatten(1) for m in golden['equilibrium']], dim=1)
        factor = 0.95 / golden['spectral_radius'].max().item()
        return Stretched(equation, value, factor), start

    @pytest.mark.parametrize('memory', [2, 5, 8, None])
    def test_restarts_reach_the_tolerance(self, hard, memory):
        equation, start = hard
        solver = BroydenSolver(400, 1e-4, memory=memory)
        solution = solver.solve(equation, start, trace=True)
        assert solution.converged.all()
        trace = solution.trace.nan_to_num(nan=0)
        # Overwriting the oldest pair in place of a restart ends at 1e10.
        assert trace.max() < 1e3

    def test_memory_bounds_what_is_stored(self, hard):
        _, start = hard
        state = BroydenSolver(400, memory=5).init(start)
        assert state.steps.shape == state.residuals.shape == (3, 5, start.shape[1])
        state = BroydenSolver(20).init(start)
        # Neither the first evaluation nor the last makes a pair.
        assert state.steps.shape == (3, 18, start.shape[1])


class TestDegenerateSteps:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    @pytest.mark.parametrize('memory', [None, 1, 3])
    def test_steps_of_zero(self, dtype, memory):
        """At the solution all steps are zero, and 0/0 is near."""
        start = torch.ones(2, 4, dtype=dtype)
        solver = BroydenSolver(9, 0, memory=memory)
        for z in iterates(solver, lambda z: z.clone(), start):
            assert torch.equal(z, start)
        solution = solver.solve(lambda z: z.clone(), start)
        assert solution.residual.eq(0).all()
        assert solution.steps.eq(9).all()

    def test_one_sample_at_its_solution_beside_others(self):
        equation, expected = affine(3)
        start = torch.zeros_like(expected)
        start[1] = expected[1]
        solution = BroydenSolver(12, 0).solve(equation, start)
        alone = BroydenSolver(12, 0).solve(
            equation.take(torch.tensor([0, 2])), start[[0, 2]]
        )
        torch.testing.assert_close(
            solution.value[[0, 2]], alone.value, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(solution.value[1], expected[1])

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    def test_a_singular_jacobian(self, dtype):
        """f(z) = z + c has none to find, and B becomes singular at once."""
        equation = Equation(lambda z, t: z + 1)
        start = torch.zeros(2, 3, dtype=dtype)
        for z in iterates(BroydenSolver(9, 0), equation, start):
            assert z.isfinite().all()
        solution = BroydenSolver(50, 1e-3, norm='abs').solve(equation, start)
        assert solution.status.eq(Status.MAX_STEPS).all()
        assert solution.value.isfinite().all()

    def test_one_dimension(self):
        """There it is the secant method."""
        equation = Equation(lambda z, t: torch.cos(z))
        start = torch.zeros(1, 1).double()
        solution = BroydenSolver(20, 1e-12).solve(equation, start)
        assert solution.converged.all()
        assert solution.value.item() == pytest.approx(0.7390851332151607, abs=1e-11)
        assert solution.steps.item() < 10
