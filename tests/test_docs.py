"""What README and docs/ show works, and what they name is there."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mdeq_mm.registry import HOOKS, MODELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def test_the_config_in_the_readme_is_the_official_small_model(tmp_path):
    text, _ = blocks(ROOT / 'README.md', 'python')
    path = tmp_path / 'readme.py'
    path.write_text(text)
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == 16_808_936
    for hook in cfg.default_hooks.values():
        HOOKS.build(hook)


def test_the_segmentation_model_in_the_readme_is_the_official_small_one():
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    _, text = blocks(ROOT / 'README.md', 'python')
    cfg = Config.fromstring(text, '.py')
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    # Without the bias that the norm of the head takes away.
    assert sum(p.numel() for p in model.parameters()) == 8_968_467 - 480


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    named = re.findall(
        r'(?<![\w/.])(?:configs|tools|docs|tests|mdeq_mm)/[\w/.-]+', text
    )
    named += re.findall(r'\]\((?!http)([^)#]+)\)', text)
    missing = [
        n
        for n in named
        if not (ROOT / n.rstrip('.')).exists() and not (page.parent / n).exists()
    ]
    assert not missing


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_make_targets_that_a_page_names_are_there(page):
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'^make ([a-z-]+)', page.read_text(), re.MULTILINE):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target
