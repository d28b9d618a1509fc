"""The package against numbers of the official implementation, in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    Equation,
    ImplicitGradient,
    PhantomGradient,
    PicardSolver,
    StateSpec,
    hutchinson,
    spectral_radius,
)
from tests.helpers import (
    Stretched,
    cosine,
    equation_of,
    logits_of,
    needs_shared,
    official_classifier,
    official_golden,
    pack,
    relative,
)

pytestmark = needs_shared('golden', 'golden_cls.pt')


@pytest.fixture(scope='module')
def golden():
    return official_golden()


@pytest.fixture
def images(golden):
    return golden['input'].double()


@pytest.fixture(scope='module')
def point(golden):
    """The equation in evaluation mode, and its equilibrium."""
    model, _ = official_classifier()
    equation, _ = equation_of(model.backbone, golden['input'].double())
    return equation, pack(golden['eval']['equilibrium'])


def test_injection(golden, images):
    backbone = official_classifier()[0].backbone
    with torch.no_grad():
        injection = backbone.injection(backbone.stem(images))
    assert relative(injection, golden['eval']['injection']) < 1e-12


def test_one_evaluation_of_f(golden, images):
    backbone = official_classifier()[0].backbone
    given = [m.double() for m in golden['eval']['f_input']]
    with torch.no_grad():
        out = backbone.equilibrium.f(given, golden['eval']['injection'].double())
        equation, _ = equation_of(backbone, images)
        flat = equation(pack(given))
    for found, expected in zip(out, golden['eval']['f_output'], strict=True):
        assert relative(found, expected) < 1e-12
    assert relative(flat, pack(golden['eval']['f_output'])) < 1e-12


@pytest.mark.parametrize(
    'solver',
    [
        dict(type='PicardSolver', max_steps=100, tol=1e-11),
        dict(type='PicardSolver', max_steps=200, tol=1e-11, damping=0.7),
        dict(type='AndersonSolver', max_steps=60, tol=1e-11),
        dict(type='AndersonSolver', max_steps=60, tol=1e-11, memory=8, mixing=0.8),
        dict(type='BroydenSolver', max_steps=60, tol=1e-11),
        dict(type='BroydenSolver', max_steps=60, tol=1e-11, memory=5),
        dict(type='BroydenSolver', max_steps=60, tol=1e-10, norm='abs'),
    ],
    ids=lambda s: ' '.join(str(v) for v in s.values()),
)
def test_equilibrium_and_logits_whatever_the_solver(golden, images, solver):
    model, _ = official_classifier(solver=solver)
    with torch.no_grad():
        maps = model.backbone(images)
        logits = logits_of(model, images)
    assert model.backbone.last_solution.converged.all()
    for found, expected in zip(maps, golden['eval']['equilibrium'], strict=True):
        assert relative(found, expected) < 1e-8
    assert relative(logits, golden['eval']['logits']) < 1e-8


@pytest.mark.parametrize('norm', ['abs', 'rel'])
def test_broyden_residuals(golden, point, norm):
    equation, z = point
    expected = torch.tensor(golden['eval'][f'broyden_{norm}_residuals'])
    seen = []

    def watched(z):
        fz = equation(z)
        seen.append(((fz - z).norm(), fz.norm()))
        return fz

    solver = BroydenSolver(max_steps=len(expected) + 1, tol=0, norm='abs')
    solution = solver.solve(watched, torch.zeros_like(z), trace=True)
    # The official norm runs over the whole batch, and its list begins after the
    # first update.
    residual = torch.stack([a for a, _ in seen])
    batch_norm = solution.trace.square().sum(1).sqrt()
    assert relative(batch_norm, residual) < 1e-12
    if norm == 'rel':
        residual = residual / torch.stack([b for _, b in seen])
    assert len(expected) == 12
    found = residual[1:]
    assert ((found - expected).abs() / expected).max() < 1e-6


def check_gradients(model, names, golden, key, tolerance):
    expected = golden[key]
    model.zero_grad()
    logits = logits_of(model, golden['input'].double())
    loss = cross_entropy(logits, golden['target'])
    loss.backward()
    assert relative(logits, expected['logits']) < 1e-8
    assert loss.item() == pytest.approx(expected['loss'].item(), rel=1e-8)
    official = {ours: theirs for theirs, ours in names.items()}
    checked = 0
    for name, parameter in model.named_parameters():
        reference = expected['grads'][official[name]]
        assert parameter.grad is not None, name
        if reference.norm() < 1e-12:
            # Biases in front of a batch norm: zero up to rounding.
            assert parameter.grad.norm() < 1e-12, name
        else:
            assert relative(parameter.grad, reference) < tolerance, name
            checked += 1
    assert checked == len(expected['grads']) - 4


@pytest.mark.parametrize('with_cp', [False, True])
def test_implicit_gradient_of_every_parameter(golden, with_cp):
    model, names = official_classifier(with_cp=with_cp)
    check_gradients(model.train(), names, golden, 'train_implicit', 1e-6)
    assert model.backbone.last_solution.adjoint.converged.all()


@pytest.mark.parametrize(
    'solver',
    [
        dict(type='PicardSolver', max_steps=100, tol=1e-11),
        dict(type='AndersonSolver', max_steps=60, tol=1e-11),
        dict(type='BroydenSolver', max_steps=60, tol=1e-11, memory=6),
    ],
    ids=lambda s: s['type'],
)
def test_implicit_gradient_with_any_solver_both_ways(golden, solver):
    gradient = dict(type='ImplicitGradient', solver=solver)
    model, names = official_classifier(solver=solver, gradient=gradient)
    check_gradients(model.train(), names, golden, 'train_implicit', 1e-6)


@pytest.mark.parametrize(
    'gradient',
    [
        dict(steps=40),
        dict(steps=40, unroll=True),
        dict(steps=100, damping=0.5),
        dict(steps=100, damping=0.5, unroll=True),
    ],
    ids=str,
)
def test_phantom_gradient_approaches_the_implicit_one(golden, gradient):
    model, names = official_classifier(
        gradient=dict(type='PhantomGradient', **gradient)
    )
    check_gradients(model.train(), names, golden, 'train_implicit', 1e-6)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('way', ['unroll_steps', 'UnrolledGradient'])
def test_unrolled_gradient_of_every_parameter(golden, with_cp, way):
    steps = golden['train_unrolled']['num_layers']
    gradient = dict(type='UnrolledGradient', steps=steps)
    if way == 'unroll_steps':
        model, names = official_classifier(with_cp=with_cp)
        model.backbone.equilibrium.unroll_steps = steps
    else:
        model, names = official_classifier(with_cp=with_cp, gradient=gradient)
    check_gradients(model.train(), names, golden, 'train_unrolled', 1e-9)


def test_hutchinson(golden, point):
    equation, z = point
    probe = golden['jacobian']['probe'].double().squeeze(2)
    found = hutchinson(equation, z, probe).item()
    assert found == pytest.approx(golden['jacobian']['loss'].item(), rel=1e-9)


def test_product_with_the_jacobian(golden, point):
    equation, z = point
    probe = golden['jacobian']['probe'].double().squeeze(2)
    (found,) = torch.autograd.functional.vjp(equation, z, probe)[1:]
    assert relative(found, golden['jacobian']['vjp'].double().squeeze(2)) < 1e-9


def test_spectral_radius(point):
    equation, z = point
    generator = torch.Generator().manual_seed(0)
    radius = spectral_radius(equation, z, generator=generator)
    assert radius.max().item() == pytest.approx(0.47, abs=0.01)
    hard = spectral_radius(Stretched(equation, z), z, generator=generator)
    assert hard.max().item() == pytest.approx(0.94, abs=0.02)


class TestHardMap:
    """f(z* + 2 (z - z*)), with a spectral radius of 0.94."""

    @pytest.mark.parametrize('memory', [5, 8])
    def test_limited_broyden_restarts(self, point, memory):
        equation, z = point
        solver = BroydenSolver(max_steps=200, tol=1e-4, memory=memory)
        hard = Stretched(equation, z)
        solution = solver.solve(hard, torch.zeros_like(z), trace=True)
        assert solution.converged.all()
        assert solution.residual.max() <= 1e-4
        # Overwriting the oldest pair in place of a restart ends at 1e10.
        assert solution.trace.nan_to_num(nan=0).max() < 1e2

    @pytest.mark.parametrize(
        'solver',
        [
            AndersonSolver(120, 1e-9, memory=5),
            AndersonSolver(120, 1e-9, memory=8, ridge=1e-10),
            BroydenSolver(120, 1e-9),
            BroydenSolver(300, 1e-9, memory=5),
            BroydenSolver(300, 1e-9, memory=8),
            PicardSolver(1000, 1e-9),
        ],
        ids=repr,
    )
    def test_solvers_reach_the_equilibrium(self, point, solver):
        equation, z = point
        solution = solver.solve(Stretched(equation, z), torch.zeros_like(z))
        assert solution.converged.all()
        # 1 / (1 - 0.94) between residual and error, and f is not normal.
        assert relative(solution.value, z) < 1e-7

    def test_acceleration_takes_fewer_evaluations(self, point):
        equation, z = point
        hard = Stretched(equation, z)
        steps = {
            name: solver.solve(hard, torch.zeros_like(z)).steps.max().item()
            for name, solver in dict(
                plain=PicardSolver(1000, 1e-9),
                anderson=AndersonSolver(120, 1e-9, memory=5),
                broyden=BroydenSolver(120, 1e-9),
            ).items()
        }
        assert steps['anderson'] < 0.5 * steps['plain']
        assert steps['broyden'] < 0.5 * steps['plain']


@pytest.fixture(scope='module')
def gradient_of_f(golden):
    """The gradient of f's parameters at z*, as one vector, of any gradient and map.

    Batch norms in evaluation mode; cross-entropy of the classifier.
    """
    model, _ = official_classifier()
    backbone = model.backbone
    images = golden['input'].double()
    maps = [m.double() for m in golden['eval']['equilibrium']]
    spec, z = StateSpec.of(maps), pack(maps)
    with torch.no_grad():
        injection = backbone.injection(backbone.stem(images))
    solver = BroydenSolver(100, 1e-11)

    def compute(gradient, factor=1.0):
        equation = backbone.equilibrium.equation(maps, injection)
        hard = Stretched(equation, z, factor)
        equation = Equation(hard, equation.tensors, equation.per_sample)
        out, solution = gradient(equation, z, solver)
        assert solution.converged.all()
        features = tuple(spec.unpack(out))
        for neck in model.neck:
            features = neck(features)
        loss = cross_entropy(model.head(features), golden['target'])
        parameters = list(backbone.equilibrium.f.parameters())
        grads = torch.autograd.grad(loss, parameters)
        return torch.cat([g.flatten() for g in grads])

    return compute


@pytest.fixture(scope='module')
def exact(gradient_of_f):
    solver = BroydenSolver(max_steps=200, tol=1e-11)
    return {f: gradient_of_f(ImplicitGradient(solver), f) for f in (1.0, 2.0)}


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize(
    ('factor', 'steps', 'expected', 'digits'),
    [
        (1.0, 1, 0.990, 1e-3),
        (1.0, 3, 0.9997, 1e-4),
        (1.0, 5, 1.0000, 1e-4),
        (2.0, 1, 0.30, 1e-2),
        (2.0, 3, 0.35, 1e-2),
        (2.0, 5, 0.49, 1e-2),
    ],
)
def test_phantom_cosine_with_the_exact_gradient(
    gradient_of_f, exact, unroll, factor, steps, expected, digits
):
    found = gradient_of_f(PhantomGradient(steps, unroll=unroll), factor)
    assert cosine([found], [exact[factor]]) == pytest.approx(expected, abs=digits)


@pytest.mark.parametrize(('steps', 'ratio'), [(1, 0.47), (3, 0.85), (5, 0.96)])
def test_damping_shrinks_the_phantom_gradient(gradient_of_f, exact, steps, ratio):
    found = gradient_of_f(PhantomGradient(steps, damping=0.5))
    assert (found.norm() / exact[1.0].norm()).item() == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize('damping', [1.0, 0.5])
def test_series_and_unrolled_phantom_gradient_agree(gradient_of_f, damping):
    series = gradient_of_f(PhantomGradient(4, damping))
    unrolled = gradient_of_f(PhantomGradient(4, damping, unroll=True))
    # As far as the equilibrium is exact.
    assert relative(series, unrolled) < 1e-8
