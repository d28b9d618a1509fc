import pytest
import torch

from mdeq_mm.implicit import AndersonSolver, Equation, PicardSolver
from tests.helpers import affine, matrix, tanh


def iterates(solver, equation, start):
    """All states at which a solver evaluates f."""
    seen = []

    def watched(z):
        seen.append(z.clone())
        return equation(z)

    solver.solve(watched, start)
    return seen


def textbook(equation, start, steps, memory, mixing=1.0):
    """Anderson acceleration of one sample with a dense constrained least squares.

    min |sum w_i r_i| with sum w_i = 1 is solved through differences to the newest
    residual.
    """
    z, values, residuals, out = start, [], [], []
    for _ in range(steps):
        out.append(z)
        fz = equation(z)
        values = [*values, fz][-memory:]
        residuals = [*residuals, fz - z][-memory:]
        f = torch.cat(values).T
        r = torch.cat(residuals).T
        if r.shape[1] == 1:
            w = torch.ones(1, dtype=z.dtype)
        else:
            differences = r[:, :-1] - r[:, -1:]
            rest = torch.linalg.lstsq(differences, -r[:, -1:], driver='gelsd').solution
            w = torch.cat([rest[:, 0], 1 - rest.sum(0)])
        z = (f @ w - (1 - mixing) * (r @ w))[None]
    return out


@pytest.mark.parametrize('memory', [1, 2, 4])
@pytest.mark.parametrize('mixing', [1.0, 0.6])
def test_iterates_are_those_of_a_dense_least_squares(memory, mixing):
    w = matrix(20, 0.9)
    equation = Equation(lambda z, t: torch.tanh(z @ w.T) + 0.3)
    start = torch.randn(3, 20).double()
    solver = AndersonSolver(10, 0, memory=memory, ridge=1e-15, mixing=mixing)
    found = iterates(solver, equation, start)
    for i in range(3):
        expected = textbook(equation, start[i : i + 1], 10, memory, mixing)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-6, atol=1e-7)


def test_ridge_draws_weights_towards_each_other():
    """Against the closed form: scaled residuals, ridge on the scaled weights."""
    equation = tanh(1, 7)
    ridge = 0.3
    start = torch.randn(1, 7).double()
    with torch.no_grad():
        f0 = equation(start)
        f1 = equation(f0)
        r = torch.cat([f0 - start, f1 - f0]).T
        norms = r.norm(dim=0)
        # Minimise |R v|^2 + ridge |v|^2 with v = w * norms, sum w = 1.
        gram = (r / norms).T @ (r / norms) + ridge * torch.eye(2).double()
        v = torch.linalg.solve(gram, 1 / norms)
        w = v / norms
        expected = (w[0] * f0 + w[1] * f1) / w.sum()
    found = iterates(AndersonSolver(3, 0, ridge=ridge), equation, start)
    torch.testing.assert_close(found[2], expected, rtol=1e-10, atol=1e-12)


def test_memory_of_one_is_the_damped_iteration():
    equation, _ = affine()
    start = torch.randn(3, 6).double()
    found = iterates(AndersonSolver(12, 0, memory=1, mixing=0.7), equation, start)
    expected = iterates(PicardSolver(12, 0, damping=0.7), equation, start)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('dim', [1, 2, 5, 8])
@pytest.mark.parametrize('radius', [0.7, 3.0])
def test_linear_problems_end_after_dim_steps(dim, radius):
    """With enough memory it is GMRES, contractive or not."""
    equation, expected = affine(2, dim, radius)
    solver = AndersonSolver(dim + 2, 1e-6, memory=dim + 1, ridge=1e-13, norm='abs')
    solution = solver.solve(equation, torch.zeros_like(expected), trace=True)
    # dim + 1 evaluations span the whole space, one more measures the result.
    assert solution.converged.all(), solution.trace
    torch.testing.assert_close(solution.value, expected, rtol=1e-3, atol=1e-4)


class TestSingularSystems:
    def check(self, equation, start, **options):
        for memory in (1, 2, 5, 12):
            solver = AndersonSolver(12, 0, memory=memory, **options)
            for z in iterates(solver, equation, start):
                assert z.isfinite().all()
            solution = solver.solve(equation, start)
            assert solution.value.isfinite().all()
            assert solution.residual.isfinite().all()
            assert solution.steps.eq(12).all()

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    @pytest.mark.parametrize('ridge', [1e-12, 1e-4])
    def test_residuals_all_the_same(self, dtype, ridge):
        equation = Equation(lambda z, t: z + torch.arange(1, 4, dtype=dtype))
        self.check(equation, torch.zeros(2, 3, dtype=dtype), ridge=ridge)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    def test_residuals_all_parallel(self, dtype):
        direction = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
        equation = Equation(lambda z, t: torch.sin(z.sum(1, keepdim=True)) * direction)
        self.check(equation, torch.ones(2, 3, dtype=dtype))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    def test_residuals_all_zero(self, dtype):
        start = torch.ones(2, 3, dtype=dtype)
        self.check(Equation(lambda z, t: z.clone()), start)
        solution = AndersonSolver(12, 0).solve(lambda z: z.clone(), start)
        assert solution.residual.eq(0).all()
        assert torch.equal(solution.value, start)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    def test_opposite_residuals(self, dtype):
        """A cycle of two: the weights of the unregularised problem are 1/2, 1/2."""
        equation = Equation(lambda z, t: 1 - z)
        start = torch.full((2, 1), 0.2, dtype=dtype)
        self.check(equation, start)
        solution = AndersonSolver(5, 1e-6).solve(equation, start)
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, torch.full((2, 1), 0.5, dtype=dtype))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    @pytest.mark.parametrize('scale', [1e-30, 1e-15, 1.0, 1e15])
    def test_more_memory_than_dimensions(self, dtype, scale):
        equation = Equation(lambda z, t: 0.5 * z + scale)
        self.check(equation, torch.zeros(2, 1, dtype=dtype))

    def test_residuals_of_very_different_size(self):
        """Nothing overflows or is lost when one residual is 1e-30 of another."""
        equation = Equation(lambda z, t: torch.where(z.abs() < 1, z + 1e-30, 0.5 * z))
        self.check(equation, torch.full((2, 2), 1e6))

    def test_one_sample_singular_beside_a_regular_one(self):
        equation, expected = affine(2)
        mixed = Equation(
            lambda z, t: torch.cat([equation(z, t)[:1], z[1:] + 1]),
            equation.tensors,
        )
        solver = AndersonSolver(60, 1e-10, memory=5)
        solution = solver.solve(mixed, torch.zeros_like(expected))
        assert solution.converged.tolist() == [True, False]
        torch.testing.assert_close(solution.value[0], expected[0], rtol=1e-8, atol=1e-8)


def test_memory_bounds_what_is_stored():
    z = torch.zeros(2, 10)
    state = AndersonSolver(50, memory=4).init(z)
    assert state.values.shape == state.residuals.shape == (2, 4, 10)
    state = AndersonSolver(3, memory=40).init(z)
    assert state.values.shape == (2, 3, 10)


def test_acceleration_beats_the_plain_iteration():
    equation, expected = affine(3, 30, radius=0.98)
    start = torch.zeros_like(expected)
    plain = PicardSolver(3000, 1e-8).solve(equation, start)
    solution = AndersonSolver(3000, 1e-8, memory=8).solve(equation, start)
    assert plain.converged.all()
    assert solution.converged.all()
    assert solution.steps.max() < 0.5 * plain.steps.min()
