"""Examples in docstrings, which the API reference shows, are run."""

import doctest
import importlib

import pytest

import mdeq_mm
from tests.docs.pages import ROOT

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

MODULES = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in sorted(ROOT.glob('mdeq_mm/**/*.py'))
    if '>>> ' in path.read_text()
]


@pytest.fixture(scope='module', autouse=True)
def toolboxes():
    """What they print when they are first imported is not of the examples."""
    mdeq_mm.get_model('mdeq-digits', device='cpu')


def test_there_are_some():
    assert {'mdeq_mm.implicit.layer', 'mdeq_mm.apis.loading'} <= set(MODULES)


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    examples = doctest.DocTestFinder().find(module)
    runner = doctest.DocTestRunner()
    for example in examples:
        # Without the names of the module: a reader has those of the example alone.
        example.globs = {}
        assert runner.run(example).failed == 0, example.name
    assert runner.tries > 0
