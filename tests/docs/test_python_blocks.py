"""The Python of the pages: scripts run, configs are read and built."""

import importlib
import runpy
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, METRICS, DefaultScope, init_default_scope
from mmengine.visualization import Visualizer

from mdeq_mm.registry import MODELS
from tests.docs.pages import SHELL, blocks, config_place, kind, pages_with, parseable
from tests.docs.sandbox import MODULES
from tests.docs.settings import registries_restored, unknown_in

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')


def build_parts(cfg):
    """Build what a config has enough for."""
    model_cfg = cfg.get('model') or cfg.get('backbone')
    scope = 'mmseg' if 'decode_head' in (model_cfg or {}) else 'mmpretrain'
    init_default_scope(cfg.get('default_scope') or scope)
    model = torch.nn.Linear(2, 2)
    if model_cfg:
        model = MODELS.build(model_cfg)
    # Some hooks look for one when they are built.
    Visualizer.get_instance('pages')
    for hook in (cfg.get('default_hooks') or {}).values():
        if 'type' in hook:
            HOOKS.build(hook)
    wrapper = cfg.get('optim_wrapper')
    if wrapper:
        wrapper.setdefault('optimizer', dict(type='SGD', lr=0.1))
        build_optim_wrapper(model, wrapper)
    for metric in cfg.get('val_evaluator') or ():
        METRICS.build(metric)


@pytest.mark.parametrize('page', pages_with('python'))
def test_python(page, sandbox, monkeypatch):
    """Blocks of a page in their order, in one folder."""
    folder = sandbox(page)
    monkeypatch.chdir(folder.root)
    monkeypatch.syspath_prepend(folder.root)
    # A reader's process has no scope yet.
    monkeypatch.setattr(DefaultScope, '_instance_dict', {})
    module = MODULES.get(page)
    with registries_restored():
        for block in blocks(page):
            if block.language != 'python' or block.reason:
                continue
            try:
                if kind(block) == 'script':
                    name = module or f'block_{block.line}'
                    ready = folder.save(block.code, f'{name}.py')
                    if not ready:
                        # test_bash_blocks.py runs it after the commands before it.
                        assert page in pages_with(*SHELL)
                    elif module:
                        importlib.import_module(module)
                    else:
                        runpy.run_path(f'{name}.py', run_name='__main__')
                    module = None
                    continue
                if kind(block) == 'config':
                    build_parts(Config.fromfile(config_place(block)))
                assert unknown_in(parseable(block.code)) == []
            except Exception as error:
                error.add_note(f'in {block}:\n{block.code}')
                raise
            except SystemExit as end:
                raise AssertionError(f'{block}: {end}') from end
    sys.modules.pop(MODULES.get(page), None)


def model_of_readme(name):
    """The model of a type that a config of the README builds."""
    for block in blocks('README.md'):
        if block.language == 'python' and kind(block) == 'config':
            model = Config.fromstring(block.code, '.py').get('model', {})
            if model.get('type') == name:
                return MODELS.build(model)
    raise AssertionError(f'no config in the README has a model of type {name}')


def test_the_config_in_the_readme_is_the_small_model():
    init_default_scope('mmpretrain')
    model = model_of_readme('ImplicitImageClassifier')
    # The backbone, the norm of 480 pooled channels, and the linear layer.
    expected = 8_742_720 + 2 * 480 + 481 * 1000
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_segmentation_model_in_the_readme_is_the_small_one():
    init_default_scope('mmseg')
    model = model_of_readme('ImplicitEncoderDecoder')
    # The official one without the bias that the norm of the head takes away, and with
    # the injection of three branches more.
    assert sum(p.numel() for p in model.parameters()) == 8_968_467 - 480 + 15_232


@pytest.mark.parametrize(
    ('code', 'said'),
    [
        ("dict(type='MDEQ', arches='small')", ['MDEQ has no argument arches']),
        ("dict(type='NoSolver')", ['NoSolver is not registered']),
        # Taken by a base class.
        ("dict(type='AndersonSolver', max_steps=8, _scope_='mmseg')", []),
        ("[dict(head=dict(type='LinearClsHead', classes=3))]",
         ['LinearClsHead has no argument classes']),
    ],
)  # fmt: skip
def test_unknown_settings_are_found(code, said):
    assert unknown_in(code) == said
