"""Building solvers and gradients from configs."""

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from mdeq_mm import implicit
from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    ImplicitGradient,
    PhantomGradient,
    build_gradient,
    build_solver,
)
from mdeq_mm.models import MDEQ
from mdeq_mm.registry import SOLVERS as REGISTRY
from mdeq_mm.registry import name_of
from tests.helpers import logged

SOLVERS = ['AndersonSolver', 'BroydenSolver', 'PicardSolver']
GRADIENTS = ['ImplicitGradient', 'PhantomGradient', 'UnrolledGradient']


@pytest.mark.parametrize('name', SOLVERS)
def test_every_solver(name):
    solver = build_solver(dict(type=name, max_steps=7, tol=0.25))
    assert type(solver).__name__ == name
    assert (solver.max_steps, solver.tol, solver.norm) == (7, 0.25, 'rel')


@pytest.mark.parametrize('name', GRADIENTS)
def test_every_gradient(name):
    assert type(build_gradient(dict(type=name))).__name__ == name


def test_ways_to_name_a_type():
    for kind in ('AndersonSolver', 'mdeq_mm.AndersonSolver', AndersonSolver):
        assert isinstance(build_solver(dict(type=kind)), AndersonSolver)
    cfg = ConfigDict(type='ImplicitGradient', solver=dict(type='PicardSolver'))
    assert isinstance(build_gradient(cfg), ImplicitGradient)
    assert type(build_gradient(cfg).solver).__name__ == 'PicardSolver'


def test_what_was_built_already_is_taken():
    solver, gradient = BroydenSolver(), PhantomGradient()
    assert build_solver(solver) is solver
    assert build_gradient(gradient) is gradient


def test_the_config_is_left_alone():
    cfg = dict(type='BroydenSolver', memory=3)
    build_solver(cfg)
    assert cfg == dict(type='BroydenSolver', memory=3)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmengine'])
def test_no_failed_search_is_logged(scope):
    if scope == 'mmpretrain':
        pytest.importorskip('mmpretrain')
    with DefaultScope.overwrite_default_scope(scope), logged() as texts:
        build_solver(dict(type='AndersonSolver'))
        build_gradient(dict(type='ImplicitGradient'))
    assert texts == []


def test_the_registry_itself_would_log_one():
    pytest.importorskip('mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'), logged() as texts:
        REGISTRY.build(dict(type='AndersonSolver'))
    assert any('Failed to search registry' in text for text in texts)


@pytest.mark.parametrize('build', [build_solver, build_gradient])
@pytest.mark.parametrize(
    'cfg', [None, 'BroydenSolver', 3, [], dict(), dict(max_steps=3), AndersonSolver]
)
def test_what_is_no_config_is_refused(build, cfg):
    with pytest.raises(TypeError, match=r'head\.part must be a dict with a type') as e:
        build(cfg, 'head.part')
    assert repr(cfg) in str(e.value)
    names = SOLVERS if build is build_solver else GRADIENTS
    assert all(name in str(e.value) for name in names)


@pytest.mark.parametrize(
    ('build', 'name'),
    [(build_solver, n) for n in SOLVERS] + [(build_gradient, n) for n in GRADIENTS],
)
def test_paths_that_mmengine_writes(build, name, tmp_path):
    """From a config with the class itself, which is dumped beside the weights."""
    source, dumped = tmp_path / 'config.py', tmp_path / 'dumped.py'
    source.write_text(
        f'from mdeq_mm.implicit import {name}\npart = dict(type={name})\n'
    )
    cfg = Config.fromfile(source, lazy_import=True)
    cls = getattr(implicit, name)
    assert type(build(cfg.part)) is cls
    cfg.dump(dumped)
    assert f'mdeq_mm.implicit.{name}' in dumped.read_text()
    assert type(build(Config.fromfile(dumped).part)) is cls
    assert type(build(dict(type=f'{cls.__module__}.{name}'))) is cls


def test_the_path_of_a_solver_of_the_user_registers_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'own_solvers.py').write_text(
        'from mdeq_mm.implicit import PicardSolver\n'
        'from mdeq_mm.registry import SOLVERS\n\n\n'
        '@SOLVERS.register_module()\n'
        'class OwnSolver(PicardSolver):\n'
        '    pass\n'
    )
    try:
        solver = build_solver(dict(type='own_solvers.OwnSolver'))
        assert type(solver).__name__ == 'OwnSolver'
    finally:
        REGISTRY.module_dict.pop('OwnSolver', None)


@pytest.mark.parametrize('kind', ['mdeq_mm.models.MDEQ', 'torch.nn.Linear', 'no.Such'])
def test_paths_of_other_things_are_refused(kind):
    with pytest.raises(ValueError, match='is not a registered solver'):
        build_solver(dict(type=kind))


@pytest.mark.parametrize(
    'kind', ['MDEQ', 'mdeq_mm.MDEQ', 'mdeq_mm.models.backbones.mdeq.MDEQ', MDEQ]
)
def test_name_of(kind):
    assert name_of(kind) == 'MDEQ'


@pytest.mark.parametrize(
    ('build', 'kind', 'names'),
    [
        (build_solver, 'NewtonSolver', SOLVERS),
        (build_solver, 'ImplicitGradient', SOLVERS),
        (build_solver, ImplicitGradient, SOLVERS),
        (build_solver, 'mmpretrain.BroydenSolver', SOLVERS),
        (build_solver, None, SOLVERS),
        (build_gradient, 'Implicit', GRADIENTS),
        (build_gradient, 'BroydenSolver', GRADIENTS),
    ],
)
def test_unknown_names_are_refused(build, kind, names):
    with pytest.raises(ValueError, match='is not a registered') as error:
        build(dict(type=kind), 'part')
    message = str(error.value)
    assert message.startswith(f'part.type={kind!r}')
    assert all(name in message for name in names)
    assert 'custom_imports' in message


@pytest.mark.parametrize('name', SOLVERS)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match='has no argument max_iter, threshold') as e:
        build_solver(dict(type=name, threshold=1, max_iter=3), 'eval_solver')
    assert f'eval_solver ({name})' in str(e.value)
    assert 'max_steps, tol, norm' in str(e.value)


@pytest.mark.parametrize('name', GRADIENTS)
def test_unknown_arguments_of_gradients_are_refused(name):
    with pytest.raises(TypeError, match=rf'gradient \({name}\) has no argument order'):
        build_gradient(dict(type=name, order=2))
