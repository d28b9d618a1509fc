"""The commands of the pages are run, in the order of each page, with its scripts."""

import re
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.docs.pages import ROOT, SHELL, blocks, kind, pages_with

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

# What a page tells its reader to install, and the commands after it need.
NEEDED = r'-r (requirements/(?:deployment|visualization)\.txt)'


def absent(code):
    """Packages that some commands would install, and that are not there."""
    found = []
    for path in re.findall(NEEDED, code):
        text = (ROOT / path).read_text()
        for name in re.findall(r'^([\w-]+)==', text, re.MULTILINE):
            try:
                version(name)
            except PackageNotFoundError:
                found.append(name)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize('page', pages_with(*SHELL))
def test_page(page, sandbox):
    """Configs of the page are there from the start (``sandbox.py``)."""
    folder = sandbox(page)
    folder.run_for_real()
    for block in blocks(page):
        if block.reason:
            continue
        try:
            if block.language in SHELL:
                folder.bash(f'set -o pipefail\n{folder.fill(block.code)}')
                if absent(block.code):
                    names = ', '.join(absent(block.code))
                    pytest.skip(f'{names} not installed, which {page} needs from here')
            elif block.language == 'python' and kind(block) == 'script':
                folder.script(block.code, f'block_{block.line}.py')
        except Exception as error:
            error.add_note(f'in {block}')
            raise
