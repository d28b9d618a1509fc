"""The documentation builds as a site without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('sphinx', reason='Sphinx is not installed')

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_builds(tmp_path):
    """Sphinx warns of links and pages that lead nowhere; -W makes that an error."""
    text = (ROOT / 'Makefile').read_text()
    # The command of 'make docs', into other folders.
    (options,) = re.findall(r'-m sphinx (-W .*) -d build/doctrees \. site', text)
    command = [sys.executable, '-m', 'sphinx', *options.split()]
    command += ['-d', str(tmp_path / 'trees'), '.', str(tmp_path / 'site')]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / 'site'
    assert 'url=docs/index.html' in (site / 'index.html').read_text()
    page = (site / 'docs' / 'api' / 'implicit.html').read_text()
    # Docstrings have been read.
    for name in ('AndersonSolver', 'BroydenSolver', 'PhantomGradient', 'Solution'):
        assert f'id="mdeq_mm.implicit.{name}"' in page
    assert 'Most evaluations of f a sample may take' in page
