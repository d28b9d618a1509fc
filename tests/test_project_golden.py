"""The package against its own golden numbers, which plain loops computed."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mdeq_mm.implicit import spectral_radius
from tests.helpers import (
    ROOT,
    SOLVERS,
    equation_of,
    load_tool,
    logits_of,
    pack,
    project_classifier,
    project_golden,
    relative,
)


@pytest.fixture(scope='module')
def golden():
    return project_golden()


@pytest.fixture
def images(golden):
    return golden['input'].double()


def test_file_is_small():
    file = ROOT / 'tests' / 'golden' / 'mdeq_tiny.pt'
    assert file.stat().st_size < 300_000


def test_injection_and_one_evaluation_of_f(golden, images):
    backbone = project_classifier().backbone
    equation, _ = equation_of(backbone, images)
    with torch.no_grad():
        injection = backbone.injection(backbone.stem(images))
    assert relative(injection, golden['injection']) < 1e-12
    expected = pack(golden['f_output'])
    assert relative(equation(pack(golden['f_input'])), expected) < 1e-12


@pytest.mark.parametrize('name', SOLVERS)
def test_equilibrium_and_logits(golden, images, name):
    solver = dict(type=SOLVERS[name].__name__, max_steps=100, tol=1e-12)
    model = project_classifier(solver=solver)
    with torch.no_grad():
        maps = model.backbone(images)
        logits = logits_of(model, images)
    assert model.backbone.last_solution.converged.all()
    for found, expected in zip(maps, golden['equilibrium'], strict=True):
        assert relative(found, expected) < 1e-10
    assert relative(logits, golden['logits']) < 1e-10


def check(model, golden, key, tolerance):
    logits = logits_of(model.train(), golden['input'].double())
    loss = cross_entropy(logits, golden['target'])
    loss.backward()
    expected = golden[key]
    assert relative(logits, expected['logits']) < 1e-10
    assert loss.item() == pytest.approx(expected['loss'].item(), rel=1e-10)
    parameters = dict(model.named_parameters())
    assert list(parameters) == golden['parameters']
    sizes = [p.numel() for p in parameters.values()]
    grads = expected['grads'].split(sizes)
    for (name, parameter), reference in zip(parameters.items(), grads, strict=True):
        if reference.norm() < 1e-12:
            assert parameter.grad.norm() < 1e-12, name
        else:
            assert relative(parameter.grad.flatten(), reference) < tolerance, name


@pytest.mark.parametrize('with_cp', [False, True])
def test_implicit_gradient(golden, with_cp):
    check(project_classifier(with_cp=with_cp), golden, 'implicit', 1e-9)


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_phantom_gradient(golden, with_cp, unroll):
    gradient = dict(type='PhantomGradient', steps=60, unroll=unroll)
    model = project_classifier(with_cp=with_cp, gradient=gradient)
    check(model, golden, 'implicit', 1e-9)


@pytest.mark.parametrize('with_cp', [False, True])
def test_unrolled_gradient(golden, with_cp):
    gradient = dict(type='UnrolledGradient', steps=5)
    model = project_classifier(with_cp=with_cp, gradient=gradient)
    check(model, golden, 'unrolled', 1e-10)


def test_spectral_radius_against_the_whole_jacobian(golden, images):
    equation, _ = equation_of(project_classifier().backbone, images)
    z = pack(golden['equilibrium'])
    found = spectral_radius(equation, z, iterations=200)
    assert found == pytest.approx(golden['spectral_radius'], abs=0.01)
    for i in range(len(z)):
        one = equation.take(torch.tensor([i]))
        (jacobian,) = torch.autograd.functional.jacobian(one, z[i : i + 1]).squeeze(2)
        largest = torch.linalg.eigvals(jacobian).abs().max().item()
        assert found[i].item() == pytest.approx(largest, abs=0.01)


@pytest.mark.slow
def test_the_script_makes_the_file_anew(golden):
    made = load_tool('dev/make_golden.py').compute()
    # Another machine rounds differently, which the training amplifies.
    assert made['names'] == golden['names']
    assert made['weights'].shape == golden['weights'].shape
    assert torch.equal(made['input'], golden['input'])
    assert made['spectral_radius'].max() < 0.6
