"""The fixed iteration: the numbers of the solvers at a tolerance of 0."""

import math

import pytest
import torch

from mdeq_mm.implicit import AndersonSolver, BroydenSolver, PicardSolver
from mdeq_mm.implicit.iteration import (
    FixedIteration,
    anderson_weights,
    fixed_solver,
    solve_positive,
)
from tests.helpers import affine, tanh


def run(solver, equation, start, **options):
    """Best iterates and residuals of the fixed iteration."""
    iteration = FixedIteration(solver, **options)
    state = iteration.begin(start)
    for _ in range(solver.max_steps):
        state = iteration.step(state, equation(state[0]))
    return state[1], state[2]


def assert_same(solver, equation, start, **options):
    expected = solver.solve(equation, start)
    with torch.no_grad():
        value, residual = run(solver, equation, start, **options)
    assert torch.allclose(value, expected.value, rtol=1e-10, atol=1e-10)
    assert torch.allclose(residual, expected.residual, rtol=1e-10, atol=1e-13)
    return expected


@pytest.mark.parametrize('steps', [1, 2, 5, 12])
@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(memory=1),
        dict(memory=3, mixing=0.6),
        dict(memory=5, ridge=1e-3, norm='abs'),
    ],
    ids=str,
)
def test_anderson_is_the_solver_at_a_tolerance_of_0(settings, steps):
    solver = AndersonSolver(max_steps=steps, tol=0, **settings)
    equation = tanh(n=4, dim=20)
    expected = assert_same(solver, equation, torch.zeros(4, 20, dtype=torch.float64))
    assert expected.steps.tolist() == [steps] * 4


@pytest.mark.parametrize('damping', [1.0, 0.5])
@pytest.mark.parametrize('norm', ['rel', 'abs'])
def test_picard_is_the_solver_at_a_tolerance_of_0(damping, norm):
    solver = PicardSolver(max_steps=9, tol=0, damping=damping, norm=norm)
    assert_same(solver, tanh(), torch.randn(3, 6, dtype=torch.float64))


def test_the_best_iterate_is_kept_where_the_last_is_worse():
    # Beyond a radius of 1 the residual of the plain iteration grows.
    equation, _ = affine(radius=1.5)
    start = torch.randn(3, 6, dtype=torch.float64)
    solver = PicardSolver(max_steps=12, tol=0, norm='abs')
    expected = assert_same(solver, equation, start)
    solution = solver.solve(equation, start, trace=True)
    assert (solution.trace[-1] > 2 * expected.residual).all()


def test_a_sample_that_diverged_is_left_alone():
    # The solver stops at the first number that is not finite, and so must this, though
    # the last iterate would be an exact fixed point.
    calls = []

    def equation(z):
        calls.append(None)
        grown = torch.full_like(z, math.inf) if len(calls) == 2 else z.clone()
        if len(calls) > 2:
            grown[0] = 7
        grown[1] = 0.5 * z[1] + 1
        return z + 1 if len(calls) == 1 else grown

    solver = PicardSolver(max_steps=5, tol=0, norm='abs')
    start = torch.zeros(2, 3, dtype=torch.float64)
    expected = solver.solve(equation, start, drop_finished=False)
    calls.clear()
    value, residual = run(solver, equation, start)
    assert torch.equal(value, expected.value)
    assert torch.equal(residual, expected.residual)
    assert residual[0] == math.sqrt(3) and residual[1] < 0.3


def test_numbers_that_are_not_finite_stay_in_their_sample():
    def equation(z):
        fz = 0.5 * z + 1
        return torch.where(torch.tensor([[False], [True]]) & (z > 1.4), math.nan, fz)

    solver = AndersonSolver(max_steps=6, tol=0)
    start = torch.zeros(2, 3, dtype=torch.float64)
    expected = assert_same(solver, equation, start)
    assert expected.value.isfinite().all()
    assert expected.residual[0] < 1e-5 < expected.residual[1]


def test_single_precision_of_the_small_systems_is_enough_to_converge():
    equation, exact = affine(n=2, dim=8)
    solver = AndersonSolver(max_steps=25, tol=0)
    start = torch.zeros(2, 8, dtype=torch.float64)
    value, residual = run(solver, equation, start, precision=torch.float32)
    assert (value - exact).abs().max() < 1e-4
    assert residual.max() < 1e-5


def test_elimination_solves_positive_definite_systems():
    a = torch.randn(7, 5, 5, dtype=torch.float64)
    matrix = a @ a.mT + 1e-3 * torch.eye(5, dtype=torch.float64)
    right = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right[:, :, None]).squeeze(2)
    found = solve_positive(matrix, right)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize('precision', [torch.float32, torch.float64])
def test_weights_of_zero_and_parallel_residuals_are_finite(precision):
    residuals = torch.zeros(2, 3, 4, dtype=precision)
    residuals[1] = 1
    used = torch.tensor([[0.0, 1, 1]] * 2, dtype=precision)
    weights = anderson_weights(residuals @ residuals.mT, used, 1e-6)
    expected = torch.tensor([[0, 0.5, 0.5]] * 2, dtype=precision)
    assert torch.allclose(weights, expected, atol=1e-6)


def test_which_solver_stands_in_for_which():
    anderson = AndersonSolver(max_steps=9, memory=3, ridge=1e-4, mixing=0.9)
    found = fixed_solver(anderson)
    assert type(found) is AndersonSolver
    assert (found.max_steps, found.tol, found.memory) == (9, 0, 3)
    assert (found.ridge, found.mixing) == (1e-4, 0.9)
    picard = fixed_solver(PicardSolver(damping=0.3), 4)
    assert type(picard) is PicardSolver
    assert (picard.max_steps, picard.damping, picard.tol) == (4, 0.3, 0)
    found = fixed_solver(BroydenSolver(max_steps=27, norm='abs'))
    assert type(found) is AndersonSolver
    assert (found.max_steps, found.norm, found.memory) == (27, 'abs', 5)
    assert type(fixed_solver(anderson, kind='picard')) is PicardSolver


def test_refusals():
    with pytest.raises(ValueError, match="solver='newton' is unknown"):
        fixed_solver(AndersonSolver(), kind='newton')
    with pytest.raises(ValueError, match=r'steps.*0'):
        fixed_solver(AndersonSolver(), 0)
    with pytest.raises(TypeError, match='steps'):
        fixed_solver(AndersonSolver(), 2.5)
