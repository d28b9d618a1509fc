import pytest
import torch

from mdeq_mm.implicit import Equation, PicardSolver
from tests.helpers import affine, tanh


def test_iterates_are_the_damped_ones():
    equation = tanh()
    z = torch.zeros(3, 6).double()
    seen = []

    def watched(z):
        seen.append(z.clone())
        return equation(z)

    PicardSolver(8, 0, damping=0.3).solve(watched, z)
    for found in seen:
        torch.testing.assert_close(found, z, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            z = 0.7 * z + 0.3 * equation(z)


@pytest.mark.parametrize('damping', [1.0, 0.8, 0.5, 0.1])
def test_rate_is_what_the_theory_of_damping_says(damping):
    eigenvalues = torch.tensor([-0.9, -0.4, 0.2, 0.7]).double()
    # Eigenvectors at right angles, so that residuals fall at the rate from the
    # start on; the state starts with all of them in it.
    basis, _ = torch.linalg.qr(torch.randn(4, 4).double())
    a = basis @ eigenvalues.diag() @ basis.T
    equation = Equation(
        lambda z, t: z @ a + t[0], (torch.ones(1, 4).double() @ basis.T,)
    )
    rate = (1 - damping + damping * eigenvalues).abs().max().item()
    solver = PicardSolver(120, 0, norm='abs', damping=damping)
    trace = solver.solve(equation, torch.zeros(1, 4).double(), trace=True).trace[:, 0]
    # Ten steps at a time, late enough that the slowest part is all that is left.
    above_floor = 40
    found = (trace[above_floor + 10] / trace[above_floor]).item() ** 0.1
    assert found == pytest.approx(rate, rel=1e-3)


def test_damping_converges_where_the_plain_iteration_diverges():
    equation = Equation(lambda z, t: -1.5 * z + 1)
    start = torch.zeros(2, 3).double()
    plain = PicardSolver(100, 1e-8).solve(equation, start)
    assert not plain.converged.any()
    damped = PicardSolver(100, 1e-8, damping=0.5).solve(equation, start)
    assert damped.converged.all()
    torch.testing.assert_close(damped.value, torch.full_like(start, 0.4))


def test_solution_does_not_depend_on_damping():
    equation, expected = affine(radius=0.5)
    for damping in (1.0, 0.6, 0.3):
        solver = PicardSolver(500, 1e-12, damping=damping)
        solution = solver.solve(equation, torch.zeros_like(expected))
        torch.testing.assert_close(solution.value, expected, rtol=1e-9, atol=1e-9)
