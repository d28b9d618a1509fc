"""One training step of random backbones, against plain loops and dense algebra.

What is expected is computed without the package's equation, solvers and gradients:
from the modules of the backbone, with loops and dense matrices written here.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from mdeq_mm.implicit import EquilibriumLayer, Status
from mdeq_mm.models import MDEQ
from tests.fuzz import strategies as fuzz

FAST, SLOW = 15, 60

#: Relative distance of gradients, and of a parameter's to all parameters'.
CLOSE, NOISE = 1e-8, 1e-11


class Squeezed(nn.Module):
    """f(c + mu (z - c)), which is contractive for small mu whatever f is."""

    def __init__(self, f, center):
        super().__init__()
        self.f = f
        for i, c in enumerate(center):
            self.register_buffer(f'center{i}', c)
        self.register_buffer('mu', torch.ones(()))

    def forward(self, maps, *inputs):
        centers = [getattr(self, f'center{i}') for i in range(len(maps))]
        moved = [c + self.mu * (m - c) for m, c in zip(maps, centers, strict=True)]
        return self.f(moved, *inputs)


class Trial:
    """A backbone as a case describes it, its images, and what it is given."""

    def __init__(self, case):
        self.case, self.given = case, None
        torch.manual_seed(case['seed'])
        model = case['model']
        self.backbone = MDEQ(**model).double()
        _randomise(self.backbone)
        arch, sides = model['arch'], fuzz.sides(model['arch'], case['size'])
        self.shapes = [
            (c, *size) for c, size in zip(arch['channels'], sides, strict=True)
        ]
        if case['contraction'] is not None:
            self._squeeze()
        self.layer = self.backbone.equilibrium
        self.layer.register_forward_pre_hook(self._note)
        self.backbone.train()
        self.images = torch.randn(
            case['batch'], model['in_channels'], *case['size'], dtype=torch.float64
        )
        if case['channels_last']:
            self.images = self.images.to(memory_format=torch.channels_last)
        self.images.requires_grad_()
        self.weights = [
            torch.randn(case['batch'], *shape, dtype=torch.float64)
            for shape in self.shapes
        ]
        if case['contraction'] is not None:
            self._calibrate()

    def _squeeze(self):
        center = [torch.randn(1, *shape, dtype=torch.float64) for shape in self.shapes]
        old = self.backbone.equilibrium
        model = self.case['model']
        self.backbone.equilibrium = EquilibriumLayer(
            Squeezed(old.f, center),
            old.solver,
            old.gradient,
            old.eval_solver,
            recompute=model['with_cp'],
        ).double()

    def _calibrate(self):
        """Choose mu, for the masks that this case's seed will draw."""
        with torch.no_grad():
            self.run()
            _, *inputs = self.given
            layer = self.layer
            center = [getattr(layer.f, f'center{i}') for i in range(len(self.shapes))]
            z = pack(center).expand(len(inputs[0]), -1)
        jacobian = self.jacobian(z, inputs)
        layer.f.mu.copy_(self.case['contraction'] / largest(jacobian))
        layer.last_solution = layer.last_spec = None

    def _note(self, layer, given):
        self.given = given

    def run(self):
        """A forward pass, with the random numbers of the case's seed."""
        torch.manual_seed(self.case['seed'] + 1)
        return self.backbone(self.images)

    def step(self):
        """Loss and gradients of one training step of the package, packed.

        Returns:
            SimpleNamespace: ``maps`` of all branches or None, ``grads`` of the images
            and the parameters that take some, and ``solution``.
        """
        self.backbone.zero_grad()
        self.images.grad = None
        maps = self.run()
        indices = self.indices
        assert len(maps) == len(indices)
        loss = sum((m * self.weights[i]).sum() for m, i in zip(maps, indices, strict=1))
        loss.backward()
        stages = ('stem.', 'injection.', 'equilibrium.')
        frozen = stages[: self.case['model']['frozen_stages'] + 1]
        for name, p in self.backbone.named_parameters():
            assert p.requires_grad != name.startswith(frozen), name
            assert p.requires_grad or p.grad is None, name
        return SimpleNamespace(
            maps=[m.detach() for m in maps],
            grads=[t.grad for t in self.leaves],
            solution=self.backbone.last_solution,
        )

    @property
    def indices(self):
        indices = self.case['model']['out_indices']
        return range(len(self.shapes)) if indices is None else indices

    @property
    def leaves(self):
        """The images, and the parameters that are not frozen."""
        return [
            self.images,
            *[p for p in self.backbone.parameters() if p.requires_grad],
        ]

    # What is expected, made of the backbone's modules alone

    def inputs(self):
        """Injections with gradients, and the masks that the layer was given."""
        arch = self.case['model']['arch']
        masks = self.given[1 + self.backbone.arch.injected :]
        rate = self.case['model']['drop_rate']
        rate = arch['dropout'] if rate is None else rate
        frozen = self.case['model']['frozen_stages'] == 2
        blocks = sum(arch['num_blocks'] or [1] * len(self.shapes))
        assert len(masks) == (0 if frozen or rate == 0 else blocks)
        for mask in masks:
            levels = mask.new_tensor([0.0, 1 / (1 - rate)])
            assert torch.isin(mask, levels).all()
        return *self.backbone.inject(self.images), *masks

    def f(self, z, inputs):
        """The map on packed states, with the module's own tensors."""
        return pack(self.layer.f(unpack(z, self.shapes), *inputs))

    def jacobian(self, z, inputs):
        """Dense Jacobians (N, D, D) of each sample by itself."""
        found = []
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        for row in range(len(z)):
            mine = [t[row : row + 1].detach() for t in inputs]
            point = z[row : row + 1].detach().requires_grad_()
            with torch.enable_grad():
                out = self.f(point, mine)[0]
                (rows,) = torch.autograd.grad(out, point, eye, is_grads_batched=True)
            found.append(rows[:, 0])
        return torch.stack(found)

    def value(self):
        """The state that the package found, packed here."""
        layer = self.layer
        return pack(layer.last_spec.unpack(layer.last_solution.value))

    def start(self):
        return torch.zeros(len(self.images), sum(map(_numbers, self.shapes))).double()

    def upstream(self):
        """Gradient of the loss in the packed output."""
        chosen = [
            w if i in self.indices else torch.zeros_like(w)
            for i, w in enumerate(self.weights)
        ]
        return pack(chosen)

    def gradients(self, out, y, keep=False):
        """Gradients of the leaves, one vjp of a packed output."""
        return torch.autograd.grad(
            out, self.leaves, y, allow_unused=True, retain_graph=keep
        )

    # Comparisons

    def compare(self, found, grads, close=CLOSE, scale=None):
        """Gradients of the package against expected ones, None being zero.

        Args:
            found (list): Of the package.
            grads (list): Expected.
            close (float): Relative distance that is allowed.
            scale (list, optional): Gradients whose norms count beside the expected
                ones, where errors are relative to more than those.
        """
        found, expected, scale = (
            [
                torch.zeros_like(t) if g is None else g
                for t, g in zip(self.leaves, some, strict=True)
            ]
            for some in (found, grads, grads if scale is None else scale)
        )
        # Norms of two numbers let no gradient through: such a case shows nothing.
        assume(expected[0].norm() > 1e-6)
        if len(expected) > 1:
            assume(max(g.norm() for g in expected[1:]) > 1e-6)
        noise = max(g.norm() for g in expected) * NOISE * (close / CLOSE)
        for mine, yours, size in zip(found, expected, scale, strict=True):
            limit = close * max(yours.norm(), size.norm()) + noise
            assert (mine - yours).norm() <= limit

    def compare_maps(self, found, z, close=1e-9):
        expected = [unpack(z, self.shapes)[i] for i in self.indices]
        for mine, yours in zip(found, expected, strict=True):
            assert mine.shape == yours.shape
            # A solve of one evaluation returns its start, zero.
            assert (mine - yours).norm() <= close * yours.norm()


def _numbers(shape):
    return shape[0] * shape[1] * shape[2]


def pack(maps):
    return torch.cat([m.reshape(len(m), -1) for m in maps], 1)


def unpack(z, shapes):
    parts = z.split([_numbers(shape) for shape in shapes], 1)
    return [part.reshape(-1, *s) for part, s in zip(parts, shapes, strict=True)]


def largest(matrices):
    """About the largest singular value of some matrices, by the power method."""
    v = torch.randn(len(matrices), matrices.shape[2], 1, dtype=matrices.dtype)
    for _ in range(30):
        v = matrices.mT @ (matrices @ v)
        v = v / v.norm(dim=1, keepdim=True)
    return (matrices @ v).norm(dim=1).max()


def _randomise(model):
    """Affine parameters away from one and zero, statistics as after a training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                torch.empty_like(p).uniform_(-0.3, 0.3) * (1 if p.dim() == 1 else 0.2)
            )
        for name, b in model.named_buffers():
            if name.endswith('running_var'):
                b.uniform_(0.5, 2)
            elif name.endswith('running_mean'):
                b.uniform_(-0.2, 0.2)


def examples(count):
    return settings(
        max_examples=count,
        suppress_health_check=list(HealthCheck),
        # Explaining a failure would take minutes.
        phases=[Phase.generate, Phase.shrink],
    )


both = pytest.mark.parametrize(
    'count',
    [FAST, pytest.param(SLOW, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)


# Gradients of what was computed, against a plain loop of the same iteration


def loop(f, z, steps, damping=1.0):
    for _ in range(steps):
        z = (1 - damping) * z + damping * f(z)
    return z


def expect_loop(trial, start, iterate):
    """Output and gradients of a plain iteration from a constant start."""
    inputs = trial.inputs()
    out = iterate(lambda z: trial.f(z, inputs), start)
    return out.detach(), trial.gradients(out, trial.upstream())


def evaluates(case):
    """Whether everything is frozen, so that the layer is in evaluation."""
    return case['model']['frozen_stages'] == 2


def fuzzed(cases, count):
    """Run a check on ``count`` cases; it returns what it counts them as."""

    def run(check):
        seen = Counter()

        @examples(count)
        @given(cases)
        def every(case):
            seen[check(case)] += 1

        every()
        assert seen.total() >= count
        return seen

    return run


@both
def test_unrolled(count):
    gradients = fuzz.unrolled() | fuzz.implicit() | fuzz.phantom()

    def check(case):
        trial = Trial(case)
        gradient = case['model']['gradient']
        steps, damping = gradient.get('steps', 3), gradient.get('damping', 1.0)
        warm_up = gradient['type'] != 'UnrolledGradient'
        if warm_up:
            # As the warm-up hook does, which any gradient has to take.
            trial.layer.unroll_steps, damping = steps, 1.0
        found = trial.step()
        if evaluates(case) and not warm_up:
            expect_evaluation(trial, found)
            return 'evaluated'
        out, grads = expect_loop(
            trial, trial.start(), lambda f, z: loop(f, z, steps, damping)
        )
        trial.compare_maps(found.maps, out)
        trial.compare(found.grads, grads)
        assert found.solution.steps.tolist() == [steps] * case['batch']
        return 'warm-up' if warm_up else 'gradient'

    seen = fuzzed(fuzz.cases(gradients, contractive=None), count)(check)
    assert min(seen['warm-up'], seen['gradient']) >= 1, seen


@both
def test_phantom_unrolled(count):
    def check(case):
        trial = Trial(case)
        gradient = case['model']['gradient']
        found = trial.step()
        z = trial.value()
        out, grads = expect_loop(
            trial, z, lambda f, z: loop(f, z, gradient['steps'], gradient['damping'])
        )
        trial.compare_maps(found.maps, z if evaluates(case) else out)
        trial.compare(found.grads, grads)
        check_solution(trial, found)
        return evaluates(case)

    fuzzed(fuzz.cases(fuzz.phantom(unroll=True), contractive=None), count)(check)


@both
def test_reversible(count):
    def check(case):
        trial = Trial(case)
        gradient = case['model']['gradient']
        found = trial.step()
        if evaluates(case):
            expect_evaluation(trial, found)
            return 'evaluated'

        def turns(f, start):
            beta, y, z = gradient['beta'], start, start
            for _ in range(gradient['steps']):
                y = (1 - beta) * y + beta * f(z)
                z = (1 - beta) * z + beta * f(y)
            return z

        out, grads = expect_loop(trial, trial.start(), turns)
        trial.compare_maps(found.maps, out)
        # What the way back may lose, of the digits that double precision has.
        lost = (1 - gradient['beta']) ** -gradient['steps']
        least = CLOSE if case['contraction'] is None else 1e-10
        trial.compare(found.grads, grads, close=max(least, 1e-13 * lost))
        assert found.solution.steps.tolist() == [2 * gradient['steps']] * case['batch']
        return 'gradient'

    cases = fuzz.cases(fuzz.reversible(), contractive=None)
    seen = fuzzed(cases, count)(check)
    assert seen['gradient'] >= count / 3, seen


# Gradients at the equilibrium, against dense algebra at the same point


def expect_at_solution(trial, adjoint):
    """Output, gradients and adjoint at the point where the solver ended.

    Args:
        adjoint (Callable): From Jacobians (N, D, D) and the incoming gradient
            (N, D) to the adjoint (N, D).
    """
    inputs, z = trial.inputs(), trial.value()
    y = adjoint(trial.jacobian(z, inputs), trial.upstream())
    out = trial.f(z, inputs)
    grads = trial.gradients(out, y, keep=True)
    # What any vector of the norm of the adjoint would give.
    any_vector = torch.randn_like(y)
    any_vector *= (y.norm(dim=1) / any_vector.norm(dim=1))[:, None]
    scale = trial.gradients(out, any_vector)
    return SimpleNamespace(z=z, out=out.detach(), grads=grads, scale=scale)


def exact_adjoint(jacobian, g):
    """y = J' y + g."""
    eye = torch.eye(g.shape[1], dtype=g.dtype)
    return torch.linalg.solve(eye - jacobian.mT, g)


def neumann(steps, damping):
    """The series, d sum_{i<k} (d J' + (1 - d) I)^i g."""

    def adjoint(jacobian, g):
        total = term = g
        for _ in range(steps - 1):
            term = (
                damping * (jacobian.mT @ term[..., None])[..., 0] + (1 - damping) * term
            )
            total = total + term
        return damping * total

    return adjoint


def expect_evaluation(trial, found):
    """A gradient that iterates differentiates implicitly in evaluation."""
    expected = expect_at_solution(trial, exact_adjoint)
    trial.compare_maps(found.maps, expected.z)
    # The default tolerance of the implicit gradient, on its adjoint, is 1e-6.
    trial.compare(found.grads, expected.grads, 1e-5, expected.scale)
    check_solution(trial, found)


def solver_of(case):
    """Config of the solver that a training step of the case solves with."""
    model = case['model']
    return (evaluates(case) and model['eval_solver']) or model['solver']


def check_solution(trial, found):
    """Residual and status tell the truth about the point that was found."""
    solver = solver_of(trial.case)
    inputs, z = trial.inputs(), trial.value()
    out = trial.f(z, inputs).detach()
    size = out.norm(dim=1)
    residual = (out - z).norm(dim=1)
    noise = 1e-13 * size
    if solver['norm'] == 'rel':
        residual, noise = residual / size, noise / size
    solution = found.solution
    assert ((solution.residual - residual).abs() <= noise + 1e-6 * residual).all()
    assert (solution.steps >= 1).all()
    assert (solution.steps <= solver['max_steps']).all()
    converged = solution.status == Status.CONVERGED
    if solver['tol']:
        assert torch.equal(converged, solution.residual <= solver['tol'])
    else:
        assert not converged.any()
    if trial.case['contraction'] is not None:
        assert (solution.status != Status.DIVERGED).all()


@both
def test_implicit(count):
    def check(case):
        trial = Trial(case)
        found = trial.step()
        expected = expect_at_solution(trial, exact_adjoint)
        trial.compare_maps(found.maps, expected.z if evaluates(case) else expected.out)
        trial.compare(found.grads, expected.grads)
        check_solution(trial, found)
        adjoint = found.solution.adjoint
        assert (adjoint.status == Status.CONVERGED).all(), adjoint
        if case['model']['gradient']['warm_start']:
            again = trial.step()
            trial.compare(again.grads, expected.grads)
            assert (again.solution.adjoint.steps == 1).all()
            return 'warm'
        return 'cold'

    seen = fuzzed(fuzz.cases(fuzz.implicit()), count)(check)
    assert len(seen) == 2, seen


@both
def test_phantom_series(count):
    def check(case):
        trial = Trial(case)
        gradient = case['model']['gradient']
        found = trial.step()
        expected = expect_at_solution(
            trial, neumann(gradient['steps'], gradient['damping'])
        )
        trial.compare_maps(found.maps, expected.z if evaluates(case) else expected.out)
        trial.compare(found.grads, expected.grads)
        check_solution(trial, found)
        return case['contraction'] is None

    gradients = fuzz.phantom(unroll=False)
    seen = fuzzed(fuzz.cases(gradients, contractive=None), count)(check)
    assert len(seen) == 2, seen


def broyden(f, z, max_steps, tol, memory, norm, check_every):
    """Broyden's method with dense matrices.

    Returns:
        tuple[Tensor, Tensor, float]: The best iterate, its estimates of the Jacobian
        of f(z) - z, (N, D, D), and the least residual that went into them.
    """
    most = max(max_steps - 2, 0)
    most = most if memory is None else min(most, memory)
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    b = plain = -eye.expand(len(z), -1, -1)
    best, lowest = z, torch.full((len(z),), torch.inf, dtype=z.dtype)
    running, pairs, step, least = lowest > 0, 0, None, torch.inf
    for count in range(1, max_steps + 1):
        fz = f(z)
        g = fz - z
        residual = g.norm(dim=1)
        if norm == 'rel':
            residual = residual / fz.norm(dim=1)
        better = running & (residual < lowest)
        best = torch.where(better[:, None], z, best)
        lowest = torch.where(better, residual, lowest)
        if tol:
            running = running & (residual > tol)
        everyone_done = count % check_every == 0 and not running.any()
        if count == max_steps or everyone_done:
            break
        g = torch.where(running[:, None], g, torch.zeros_like(g))
        if step is None:
            b, pairs = plain, 0
        else:
            length = step.square().sum(1).clamp_min(1e-300)
            b = b + g[:, :, None] * (step / length[:, None])[:, None]
            pairs += 1
            least = min([least, *(g[running].norm(dim=1)).tolist()])
        direction = -torch.linalg.solve(b, g)
        step = direction if pairs < most else None
        z = torch.where(running[:, None], z + direction, best)
    return best, b, least


@both
def test_shared_inverse(count):
    def check(case):
        trial = Trial(case)
        found = trial.step()
        solver, gradient = solver_of(case), case['model']['gradient']
        if solver['type'] != 'BroydenSolver':
            # There is no inverse to share.
            expect_evaluation(trial, found)
            return 'evaluated'
        inputs = trial.inputs()
        with torch.no_grad():
            z, b, least = broyden(
                lambda z: trial.f(z, inputs),
                trial.start(),
                *[solver[k] for k in 'max_steps tol memory norm check_every'.split()],
            )
        # Rounding in the last residuals enters the estimate.
        close = max(CLOSE, 1e-12 / least)
        assert (trial.value() - z).norm() <= close * z.norm()
        ways = set()

        def adjoint(jacobian, g):
            first = -torch.linalg.solve(b.mT, g)
            refined = (jacobian.mT @ first[..., None])[..., 0] + g
            residual = (refined - first).norm(dim=1) / refined.norm(dim=1)
            # Each sample by itself.
            poor = residual > gradient['limit']
            if gradient['fallback'] and poor.any():
                ways.add('fallback')
                return torch.where(poor[:, None], exact_adjoint(jacobian, g), refined)
            ways.add('estimate')
            return refined

        expected = expect_at_solution(trial, adjoint)
        trial.compare_maps(found.maps, expected.z if evaluates(case) else expected.out)
        trial.compare(found.grads, expected.grads, close=close)
        check_solution(trial, found)
        (way,) = ways
        return way

    limits = dict(
        max_steps=st.integers(1, 6),
        tol=st.sampled_from([0, 1e-6, 1e-3, 0.1]),
        norm=st.sampled_from(['rel', 'abs']),
        drop_finished=st.sampled_from([None, True, False]),
        check_every=st.integers(1, 3),
    )
    solver = fuzz.broyden(**limits)
    cases = fuzz.cases(fuzz.shared_inverse(), solver, solver | fuzz.picard(**limits))
    seen = fuzzed(cases, count)(check)
    assert seen['estimate'] >= 1, seen
    assert seen['fallback'] >= 1 or count < SLOW, seen
