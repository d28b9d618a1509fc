"""What all solvers share: the loop, its bookkeeping, and its arguments."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    Equation,
    PicardSolver,
    Solver,
    Status,
)
from mdeq_mm.implicit.solvers import base
from tests.helpers import (
    SOLVERS,
    Counting,
    affine,
    equation_of,
    matrix,
    project_classifier,
    project_golden,
    relative,
    tanh,
)

every_solver = pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)
with_and_without_drop = pytest.mark.parametrize('drop', [False, True])


def zeros(equation):
    return torch.zeros_like(equation.tensors[1]).detach()


def residual_at(equation, z, norm='rel'):
    fz = equation(z)
    residual = (fz - z).norm(dim=1)
    return residual / fz.norm(dim=1) if norm == 'rel' else residual


class TestStatus:
    @every_solver
    @pytest.mark.parametrize('norm', ['rel', 'abs'])
    def test_converged(self, kind, norm):
        equation, expected = affine()
        solver = kind(max_steps=200, tol=1e-10, norm=norm)
        solution = solver.solve(equation, zeros(equation))
        assert solution.status.eq(Status.CONVERGED).all()
        assert solution.converged.all()
        assert solution.residual.le(1e-10).all()
        assert relative(solution.value, expected) < 1e-8
        assert solution.steps.lt(200).all()

    @every_solver
    @pytest.mark.parametrize('norm', ['rel', 'abs'])
    def test_stalled_at_the_floor_of_half_precision(self, kind, norm):
        equation, expected = affine()
        rounded = Equation(
            lambda z, t: equation(z, t).bfloat16(), equation.tensors, (False, True)
        )
        solution = kind(max_steps=300, tol=1e-7, norm=norm).solve(
            rounded, zeros(equation), precision=torch.bfloat16
        )
        # A plain iteration may hit a fixed point of the rounded map exactly.
        stalled = solution.status == Status.STALLED
        assert stalled.any()
        assert (stalled | solution.converged).all()
        assert solution.steps.lt(300).all()
        assert solution.residual[stalled].lt(3e-2).all()
        assert relative(solution.value, expected) < 5e-2

    @every_solver
    @pytest.mark.parametrize('norm', ['rel', 'abs'])
    def test_stalled_at_the_floor_of_double_precision(self, kind, norm):
        equation, expected = affine()
        solver = kind(max_steps=500, tol=1e-30, norm=norm)
        solution = solver.solve(equation, zeros(equation))
        # Rounding may lead to an exact fixed point.
        assert (solution.converged | (solution.status == Status.STALLED)).all()
        assert solution.steps.lt(500).all()
        assert relative(solution.value, expected) < 1e-13

    def test_the_floor_is_that_of_the_equation(self):
        x = torch.rand(2, 6)
        equation = Equation(lambda z, t: z + 1e-3 * t[0], (x,), (True,))
        start = torch.full((2, 6), 10.0)
        solver = PicardSolver(60, 1e-9)
        for dtype, status in (
            (torch.float32, Status.MAX_STEPS),
            (torch.float16, Status.STALLED),
            (torch.bfloat16, Status.STALLED),
        ):
            solution = solver.solve(equation.bind([x.to(dtype)]), start)
            assert solution.status.eq(status).all()

    def test_a_plateau_is_no_reason_to_stop(self):
        # Residual 1 for forty evaluations, which then halves.
        equation = Equation(lambda z, t: z + ((44 - z) / 2).clamp_max(1))
        start = torch.ones(2, 1, dtype=torch.float64)
        solution = PicardSolver(100, 1e-10, norm='abs').solve(equation, start)
        assert solution.converged.all()
        assert relative(solution.value, torch.full_like(start, 44)) < 1e-11

    @pytest.mark.parametrize(
        'kind', [BroydenSolver, partial(AndersonSolver, memory=30)]
    )
    def test_accelerated_solvers_cross_a_plateau(self, kind):
        """Near a cyclic shift each step finds one new coordinate, and no residual."""
        dim = 24
        g = torch.roll(torch.eye(dim).double(), 1, 0)
        g += 0.1 * torch.randn(dim, dim).double()
        x = torch.nn.functional.one_hot(torch.tensor([0, 5, 9]), dim).double()
        equation = Equation(lambda z, t: z + t[0] - z @ g.T, (x,), (True,))
        solver = kind(max_steps=200, tol=1e-10, norm='abs')
        solution = solver.solve(equation, torch.zeros_like(x), trace=True)
        best = solution.trace.cummin(0).values
        assert (best[12:] > 0.99 * best[:-12]).any()
        assert solution.converged.all()
        assert relative(solution.value, torch.linalg.solve(g, x.T).T) < 1e-8

    @every_solver
    def test_max_steps(self, kind):
        equation, _ = affine(radius=0.9)
        solution = kind(max_steps=4, tol=1e-10).solve(equation, zeros(equation))
        assert solution.status.eq(Status.MAX_STEPS).all()
        assert solution.steps.eq(4).all()

    @pytest.mark.parametrize('norm', ['rel', 'abs'])
    def test_a_rise_is_no_divergence(self, norm):
        def rises(z, tensors):
            if norm == 'rel':
                # f(z) nears zero while z does not.
                return torch.where(z > 1, 1 + 0 * z, 1e-9 + 0 * z)
            return torch.where(z < 1e9, 10 * z, z / 2 + 1e9)

        start = torch.full((2, 1), 1.5, dtype=torch.float64)
        solver = PicardSolver(100, 1e-4, norm=norm)
        solution = solver.solve(Equation(rises), start, trace=True)
        trace = solution.trace[:, 0]
        assert trace.max() > 1e7 * trace[0]
        assert solution.converged.all()
        expected = torch.full_like(start, dict(rel=1e-9, abs=2e9)[norm])
        assert relative(solution.value, expected) < 1e-12

    @every_solver
    @pytest.mark.parametrize('norm', ['rel', 'abs'])
    def test_a_start_at_the_solution_is_no_divergence(self, kind, norm):
        exact = torch.randn(8, 6, dtype=torch.float64)
        equation = Equation(lambda z, t: exact + 0.9 * (z - exact))
        solution = kind(max_steps=20, tol=0, norm=norm).solve(equation, exact)
        assert solution.status.eq(Status.MAX_STEPS).all()
        assert solution.residual.eq(0).all()
        assert torch.equal(solution.value, exact)

    @every_solver
    def test_diverged_by_growth_out_of_range(self, kind):
        equation = Equation(lambda z, t: z.pow(2) + 1)
        start = torch.full((2, 3), 1e30)
        solution = kind(100, 1e-3).solve(equation, start)
        assert solution.status.eq(Status.DIVERGED).all()
        assert torch.equal(solution.value, start)

    @every_solver
    @with_and_without_drop
    def test_diverged_by_numbers_that_are_not_finite(self, kind, drop):
        equation, expected = affine(4)
        equation.tensors[1][1] = torch.nan
        equation.tensors[1][2, 3] = torch.inf
        solver = kind(max_steps=100, tol=1e-10)
        solution = solver.solve(
            equation, torch.zeros(4, 6).double(), drop_finished=drop
        )
        assert solution.status.tolist() == [0, 3, 3, 0]
        assert solution.steps[1:3].tolist() == [1, 1]
        assert solution.residual[1:3].isinf().all()
        assert solution.value.isfinite().all()
        assert relative(solution.value[[0, 3]], expected[[0, 3]]) < 1e-8

    @every_solver
    @with_and_without_drop
    def test_finite_at_first(self, kind, drop):
        """f turns NaN for one sample in the middle of its solve."""
        equation, expected = affine(3)
        calls = []

        def spoiled(z, tensors):
            calls.append(len(z))
            out = equation(z, tensors)
            if len(calls) >= 4:
                out = torch.where(tensors[1][:, :1] == mark, torch.nan, out)
            return out

        mark = equation.tensors[1][1, 0].item()
        broken = Equation(spoiled, equation.tensors, (False, True))
        solver = kind(max_steps=100, tol=1e-10)
        solution = solver.solve(broken, zeros(equation), trace=True, drop_finished=drop)
        assert solution.status.tolist() == [0, 3, 0]
        assert solution.steps[1] == 4
        assert solution.value.isfinite().all()
        # The best of the three evaluations that were finite.
        assert solution.residual[1] == solution.trace[:3, 1].min()
        assert solution.trace[3, 1].isinf()
        assert relative(solution.value[[0, 2]], expected[[0, 2]]) < 1e-8


@every_solver
@pytest.mark.parametrize('drop', [False, True])
def test_zero_tolerance_runs_all_steps(kind, drop):
    equation, _ = affine(radius=0.3)
    # At the end the residual is exactly zero, or at the floor of float64.
    for steps in (1, 2, 3, 80):
        counted = Counting(equation)
        solution = kind(max_steps=steps, tol=0).solve(
            counted, zeros(equation), drop_finished=drop
        )
        assert counted.log == [3] * steps
        assert solution.steps.eq(steps).all()
        assert solution.status.eq(Status.MAX_STEPS).all()
        assert solution.value.isfinite().all()


@every_solver
@pytest.mark.parametrize('norm', ['rel', 'abs'])
@pytest.mark.parametrize('radius', [0.5, 1.5])
def test_the_best_iterate_is_returned(kind, norm, radius):
    equation = tanh(5, radius=radius)
    solver = kind(max_steps=9, tol=1e-6, norm=norm)
    solution = solver.solve(equation, zeros(equation), trace=True)
    expected = residual_at(equation, solution.value, norm)
    torch.testing.assert_close(solution.residual, expected, rtol=1e-9, atol=1e-15)
    best = solution.trace.nan_to_num(nan=math.inf).min(0).values
    assert torch.equal(solution.residual, best)


def test_a_worse_last_iterate_is_not_returned():
    # One step towards zero, then away from it.
    equation = Equation(lambda z, t: torch.where(z > 1, z / 2, -4 * z))
    start = torch.tensor([[1.6]], dtype=torch.float64)
    solution = PicardSolver(3, 1e-9, norm='abs').solve(equation, start, trace=True)
    assert solution.trace[:, 0].tolist() == pytest.approx([0.8, 4.0, 16.0])
    assert solution.value.item() == 1.6
    assert solution.residual.item() == pytest.approx(0.8)


@every_solver
@with_and_without_drop
def test_trace(kind, drop):
    equation, _ = affine(4)
    equation.tensors[1][3] = torch.nan
    start = torch.zeros(4, 6).double()
    solver = kind(max_steps=100, tol=1e-6)
    assert solver.solve(equation, start).trace is None
    solution = solver.solve(equation, start, trace=True, drop_finished=drop)
    assert solution.trace.shape == (solution.steps.max(), 4)
    for i, steps in enumerate(solution.steps.tolist()):
        assert solution.trace[steps:, i].isnan().all()
        assert not solution.trace[:steps, i].isnan().any()
    assert solution.trace[-1, solution.steps.argmax()] <= 1e-6
    assert torch.equal(solution.trace[0, :3], residual_at(equation, start, 'rel')[:3])


@every_solver
def test_start_is_used_and_left_alone(kind):
    equation, expected = affine()
    start = expected + 1e-7 * torch.randn_like(expected)
    before = start.clone()
    solution = kind(max_steps=50, tol=1e-9).solve(equation, start)
    assert torch.equal(start, before)
    far = kind(max_steps=50, tol=1e-9).solve(equation, zeros(equation))
    assert solution.steps.max() < far.steps.min()
    exact = kind(max_steps=50, tol=1e-9).solve(equation, expected)
    assert exact.steps.eq(1).all()
    assert torch.equal(exact.value, expected)


@every_solver
def test_a_start_that_is_not_finite_is_replaced(kind):
    equation, expected = affine()
    start = zeros(equation)
    start[1, 2] = torch.nan
    start[2, 0] = torch.inf
    solution = kind(max_steps=100, tol=1e-10).solve(equation, start)
    assert solution.converged.all()
    assert relative(solution.value, expected) < 1e-8


@every_solver
def test_nothing_is_recorded_for_autograd(kind):
    equation = tanh()
    solution = kind(max_steps=10).solve(equation, zeros(equation), trace=True)
    for tensor in (solution.value, solution.residual, solution.trace):
        assert not tensor.requires_grad
    assert equation.tensors[0].grad is None


@every_solver
@pytest.mark.parametrize('steps', [1, 2, 3])
@pytest.mark.parametrize('n', [1, 3])
def test_very_few_steps(kind, steps, n):
    equation, _ = affine(n)
    counted = Counting(equation)
    solution = kind(max_steps=steps, tol=1e-12).solve(
        counted, zeros(equation), trace=True
    )
    assert counted.log == [n] * steps
    assert solution.steps.eq(steps).all()
    assert solution.trace.shape == (steps, n)
    torch.testing.assert_close(solution.residual, residual_at(equation, solution.value))


@every_solver
def test_the_first_iterates_are_the_plain_ones(kind):
    """Whatever the method, it has nothing to go by but f(z) at first."""
    equation, _ = affine()
    seen = []

    def watched(z):
        seen.append(z.clone())
        return equation(z)

    kind(max_steps=2, tol=0).solve(watched, zeros(equation))
    torch.testing.assert_close(seen[1], equation(zeros(equation)))


@every_solver
def test_evaluations_are_as_many_as_the_steps_say(kind):
    # Samples of very different difficulty.
    scale = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.95]).double()[:, None]
    a = matrix(8, 1.0)
    equation = Equation(
        lambda z, t: torch.tanh(t[0] * (z @ a.T)) + t[1],
        (scale, torch.randn(5, 8).double()),
        (True, True),
    )
    counted = Counting(equation)
    solver = kind(max_steps=400, tol=1e-8)
    start = torch.zeros(5, 8).double()
    solution = solver.solve(counted, start, drop_finished=True)
    assert solution.converged.all()
    assert solution.steps.unique().numel() >= 4
    assert sum(counted.log) == solution.steps.sum()
    assert counted.log == sorted(counted.log, reverse=True)

    counted = Counting(equation)
    whole = solver.solve(counted, start, drop_finished=False)
    assert counted.log == [5] * int(whole.steps.max())
    assert torch.equal(whole.steps, solution.steps)
    assert relative(whole.value, solution.value) < 1e-12


@every_solver
@pytest.mark.parametrize('drop', [False, True])
def test_the_solution_shares_no_memory_with_the_start(kind, drop):
    equation, expected = affine(radius=0.6)
    for start in (expected.clone(), torch.cat([expected[:1], zeros(equation)[1:]])):
        before = start.clone()
        value = kind(max_steps=50, tol=1e-6).solve(
            equation, start, drop_finished=drop
        ).value  # fmt: skip
        assert torch.equal(start, before)
        value.fill_(7)
        assert torch.equal(start, before)


@every_solver
def test_who_decides_whether_samples_leave(kind):
    equation, expected = affine(radius=0.6)
    start = zeros(equation)
    start[0] = expected[0]

    def rows(drop_finished, asked):
        counted = Counting(equation)
        solver = kind(max_steps=50, tol=1e-6, drop_finished=drop_finished)
        solver.solve(counted, start, drop_finished=asked)
        return counted.log

    assert set(rows(None, False)) == {3}
    assert min(rows(None, True)) < 3
    assert set(rows(False, True)) == {3}
    assert min(rows(True, False)) < 3


class TestIndependence:
    """A sample's solution does not depend on the samples beside it."""

    def mixed(self):
        """Easy, hard and broken samples of one equation, and one without rest."""
        a = matrix(10, 1.0)
        x = torch.randn(7, 10).double()
        x[2] = torch.nan
        x[4, 0] = -torch.inf
        scale = torch.tensor([0.1, 0.9, 0.5, 1.3, 0.5, 0.5, 0.97]).double()[:, None]
        return Equation(
            lambda z, t: t[0] * (torch.sin(0.3 * z) / 0.3 @ a.T) + t[1],
            (scale, x),
            (True, True),
        )

    @every_solver
    @with_and_without_drop
    @pytest.mark.parametrize('norm', ['rel', 'abs'])
    def test_alone_and_in_a_mixed_batch(self, kind, drop, norm):
        equation = self.mixed()
        start = torch.zeros(7, 10).double()
        solver = kind(max_steps=40, tol=1e-8, norm=norm)
        batch = solver.solve(equation, start, trace=True, drop_finished=drop)
        assert batch.status[[2, 4]].eq(Status.DIVERGED).all()
        assert batch.converged[[0, 5]].all()
        for i in range(7):
            index = torch.tensor([i])
            alone = solver.solve(
                equation.take(index), start[index], trace=True, drop_finished=drop
            )
            assert alone.steps.item() == batch.steps[i].item()
            assert alone.status.item() == batch.status[i].item()
            torch.testing.assert_close(
                alone.trace[:, 0],
                batch.trace[: len(alone.trace), i],
                rtol=1e-6,
                atol=1e-11,
                equal_nan=True,
            )
            if batch.converged[i]:
                assert relative(alone.value, batch.value[index]) < 1e-9

    @every_solver
    @with_and_without_drop
    def test_on_a_real_map(self, kind, drop):
        backbone = project_classifier().backbone
        images = project_golden()['input'].double()
        images = torch.cat([images, images[:1] * 30, images[:1] * torch.nan])
        equation, start = equation_of(backbone, images)
        solver = kind(max_steps=80, tol=1e-10)
        batch = solver.solve(equation, start, drop_finished=drop)
        assert batch.status[-1] == Status.DIVERGED
        for i in range(3):
            index = torch.tensor([i])
            alone = solver.solve(equation.take(index), start[index], drop_finished=drop)
            assert alone.converged.all()
            assert alone.steps.item() == batch.steps[i].item()
            assert relative(alone.value, batch.value[index]) < 1e-9


@every_solver
@pytest.mark.parametrize('scale', [1e-12, 1e12])
def test_scale_of_the_problem_does_not_matter(kind, scale):
    """Solving c f(z / c) gives c z*, as long as numbers are neither huge nor tiny."""
    equation, expected = affine()
    scaled = Equation(
        lambda z, t: scale * equation(z / scale, t), equation.tensors, (False, True)
    )
    solution = kind(max_steps=100, tol=1e-10).solve(scaled, zeros(equation))
    assert solution.converged.all()
    assert relative(solution.value, scale * expected) < 1e-8


@every_solver
def test_huge_numbers_are_reported_and_not_returned(kind):
    """Norms overflow in float32 although the numbers themselves do not."""
    equation = Equation(lambda z, t: 0.5 * z + 1e30)
    solution = kind(max_steps=50, tol=1e-5).solve(equation, torch.zeros(2, 5))
    assert solution.value.isfinite().all()
    assert not solution.residual.isnan().any()
    assert solution.steps.ge(1).all()


@every_solver
def test_zero_solution(kind):
    """f(z) = z = 0 is a fixed point: its relative residual is zero, not 0/0."""
    equation = Equation(lambda z, t: 0.5 * z)
    solution = kind(max_steps=20).solve(equation, torch.zeros(2, 3))
    assert solution.converged.all()
    assert solution.steps.eq(1).all()
    assert solution.residual.eq(0).all()


@every_solver
def test_f_that_is_zero_away_from_its_solution(kind):
    """The relative residual there has no scale, but it is no divergence."""
    for dtype in (torch.float32, torch.float64):
        equation = Equation(lambda z, t: 0 * z)
        start = torch.full((2, 30), 7.0, dtype=dtype)
        solution = kind(max_steps=20).solve(equation, start)
        assert solution.converged.all()
        assert solution.value.eq(0).all()


@every_solver
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_type_of_the_state_is_kept(kind, dtype):
    equation = tanh(dtype=dtype)
    solution = kind(max_steps=60, tol=1e-5).solve(equation, zeros(equation), trace=True)
    assert solution.value.dtype == dtype
    assert solution.residual.dtype == dtype
    assert solution.trace.dtype == dtype
    assert solution.steps.dtype == solution.status.dtype == torch.int64
    assert solution.converged.all()


@every_solver
def test_an_empty_batch(kind):
    equation, _ = affine(2)
    equation = equation.take(torch.tensor([], dtype=torch.int64))
    solution = kind(max_steps=5).solve(equation, torch.zeros(0, 6).double())
    assert solution.value.shape == (0, 6)
    assert solution.status.shape == (0,)


@every_solver
def test_one_synchronisation_a_step(kind, monkeypatch):
    """Each number read from a tensor would stop a GPU."""
    monkeypatch.setattr(base, '_known', lambda mask: False)
    equation, _ = affine(radius=0.9)
    start = zeros(equation)
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name()
            if name in ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::equal'):
                read.append(name)
            return function(*args, **(kwargs or {}))

    with Reads():
        kind(max_steps=12, tol=1e-12).solve(equation, start, drop_finished=False)
    assert len(read) <= 12


class TestArguments:
    @every_solver
    @pytest.mark.parametrize(
        ('arguments', 'error', 'words'),
        [
            (dict(max_steps=0), ValueError, 'max_steps=0 .*1 or more'),
            (dict(max_steps=-3), ValueError, 'max_steps=-3'),
            (dict(max_steps=2.5), TypeError, 'max_steps must be an integer, got 2.5'),
            (dict(max_steps=True), TypeError, 'max_steps .* True'),
            (dict(tol=-1e-3), ValueError, 'tol=-0.001 must be .*at least 0'),
            (dict(tol=math.nan), ValueError, 'tol=nan must be finite'),
            (dict(tol=math.inf), ValueError, 'tol=inf must be finite'),
            (dict(tol='1e-3'), TypeError, "tol must be a number, got '1e-3'"),
            (dict(tol=None), TypeError, 'tol must be a number, got None'),
            (dict(norm='l2'), ValueError, "norm='l2' is unknown: use 'rel' or 'abs'"),
            (dict(norm=None), ValueError, 'norm=None is unknown'),
            (dict(drop_finished='yes'), TypeError, "drop_finished .*got 'yes'"),
        ],
        ids=str,
    )
    def test_refused(self, kind, arguments, error, words):
        with pytest.raises(error, match=words):
            kind(**arguments)

    @pytest.mark.parametrize(
        ('kind', 'arguments', 'error', 'words'),
        [
            (PicardSolver, dict(damping=0), ValueError, 'damping=0 .*0 < damping <= 1'),
            (PicardSolver, dict(damping=1.5), ValueError, 'damping=1.5'),
            (PicardSolver, dict(damping='x'), ValueError, "damping='x'"),
            (AndersonSolver, dict(memory=0), ValueError, 'memory=0 .*1 or more'),
            (AndersonSolver, dict(memory=None), TypeError, 'memory .*got None'),
            (AndersonSolver, dict(ridge=0), ValueError, 'ridge=0 .*0 < ridge'),
            (AndersonSolver, dict(ridge=math.nan), ValueError, 'ridge=nan'),
            (AndersonSolver, dict(mixing=0.0), ValueError, 'mixing=0.0'),
            (AndersonSolver, dict(mixing=2), ValueError, 'mixing=2'),
            (BroydenSolver, dict(memory=0), ValueError, 'memory=0 .*1 or more'),
            (BroydenSolver, dict(memory=1.0), TypeError, 'memory .*integer'),
        ],
        ids=str,
    )
    def test_own_arguments_refused(self, kind, arguments, error, words):
        with pytest.raises(error, match=words):
            kind(**arguments)

    @every_solver
    def test_repr_shows_them(self, kind):
        text = repr(kind(max_steps=7, tol=0.5, norm='abs'))
        assert text.startswith(kind.__name__)
        assert 'max_steps=7' in text
        assert "norm='abs'" in text


def test_a_solver_of_ones_own():
    """A new solver says how the next iterate is made and nothing else."""

    class Halfway(Solver):
        def step(self, state, z, fz):
            return (z + fz) / 2

    equation, expected = affine()
    solution = Halfway(200, 1e-10).solve(equation, zeros(equation))
    assert solution.converged.all()
    assert relative(solution.value, expected) < 1e-8
    with pytest.raises(NotImplementedError):
        Solver().solve(equation, zeros(equation))


@every_solver
def test_a_solver_that_returns_nonsense_is_survived(kind):
    """Steps that are not finite are replaced by plain ones."""

    class Broken(kind):
        def step(self, state, z, fz):
            out = super().step(state, z, fz).clone()
            out[1] = torch.nan
            return out

    equation, expected = affine(radius=0.5)
    solution = Broken(max_steps=200, tol=1e-10).solve(equation, zeros(equation))
    assert solution.converged.all()
    assert relative(solution.value, expected) < 1e-8


class TestCheckEvery:
    """Looking less often changes how long a solve waits, not what it returns."""

    @every_solver
    @pytest.mark.parametrize('every', [2, 5, 100])
    def test_same_results(self, kind, every):
        equation, _ = affine(4, 6, radius=0.5)
        start = zeros(equation)
        expected = kind(max_steps=40, tol=1e-6).solve(equation, start)
        found = kind(max_steps=40, tol=1e-6, check_every=every).solve(equation, start)
        assert expected.steps.max() < 40
        for name in ('steps', 'status'):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert relative(found.value, expected.value) < 1e-12
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-6, atol=0)

    @every_solver
    def test_evaluations(self, kind):
        """Up to the next look at most, counted by what is handed to f."""
        equation, _ = affine(4, 6, radius=0.5)
        start = zeros(equation)
        needed = kind(max_steps=60, tol=1e-6).solve(equation, start).steps.max().item()
        counted = Counting(equation)
        kind(max_steps=60, tol=1e-6, check_every=7).solve(counted, start)
        assert len(counted.log) == -(-needed // 7) * 7

    def test_synchronisations(self, monkeypatch):
        monkeypatch.setattr(base, '_known', lambda mask: False)
        equation, _ = affine(radius=0.9)
        read = []

        class Reads(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.name() == 'aten::_local_scalar_dense':
                    read.append(1)
                return function(*args, **(kwargs or {}))

        with Reads():
            AndersonSolver(20, tol=0, check_every=5).solve(equation, zeros(equation))
        assert len(read) == 3

    @every_solver
    def test_refused(self, kind):
        with pytest.raises(ValueError, match=r'check_every=0 .*1 or more'):
            kind(check_every=0)


@pytest.mark.parametrize('norm', ['rel', 'abs'])
def test_a_long_rise_before_the_solution_is_no_rest(norm):
    """The residual of a shift that grows 20 entries ahead, then is zero at once."""
    n = 30
    shift = torch.diag(torch.full((n - 1,), 10.0, dtype=torch.float64), 1)
    bias = torch.zeros(1, n, dtype=torch.float64)
    bias[0, -1] = 1

    def f(z):
        return z @ shift.T + bias

    solver = PicardSolver(max_steps=80, tol=1e-9, norm=norm)
    solution = solver.solve(f, torch.zeros_like(bias))
    assert solution.status.tolist() == [Status.CONVERGED]
    assert solution.residual.item() == 0 and solution.steps.item() == n + 1
