"""What the pages name is there, and every block of theirs is of a kind that is run."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, SHELL, blocks, texts

# The few blocks that are not run, by page; each says why in a comment above it.
NOT_RUN = {'docs/datasets.md': 1}
# Sphinx's own, and what is no code: trees of folders.
DIRECTIVES = ('{include}', '{toctree}', '{eval-rst}')
FOLDERS = 'configs|tools|docs|tests|mdeq_mm|requirements|experiments'


def test_there_are_pages():
    assert {'README.md', 'docs/choosing.md', 'configs/imagenet/README.md'} <= set(PAGES)


@pytest.mark.parametrize('page', PAGES)
def test_every_block_is_of_a_kind_that_is_run(page):
    for block in blocks(page):
        language = block.language.partition(' ')[0]
        if language in ('', 'text'):
            # A tree, or what a program prints.
            start = block.code.split()[0]
            assert start not in ('python', 'pip', 'make', 'bash', 'import', 'from')
        else:
            assert language in ('python', *SHELL, *DIRECTIVES), str(block)


def test_few_blocks_are_not_run():
    found = {}
    for page in PAGES:
        reasons = [b.reason for b in blocks(page) if b.reason]
        if reasons:
            found[page] = len(reasons)
            assert all(len(reason.split()) > 3 for reason in reasons)
        comments = re.findall('<!-- not run', (ROOT / page).read_text())
        assert len(comments) == len(reasons), f'{page}: a comment without a block'
    assert found == NOT_RUN


def names(page):
    """Files that inline code, links and blocks of a page name."""
    for text in texts(page):
        if text.kind == 'link':
            if not re.match(r'https?:|mailto:|#', text.text):
                yield str(text), text.text.partition('#')[0]
            continue
        for name in re.findall(rf'(?<![\w/.])(?:{FOLDERS})/[\w/.-]+', text.text):
            yield str(text), name
    for block in blocks(page):
        for name in re.findall(rf'(?<![\w/.])(?:{FOLDERS})/[\w/.-]+', block.code):
            yield str(block), name
        if block.language.startswith('{include}'):
            yield str(block), block.language.split()[1]
        if block.language.startswith('{toctree}'):
            for line in block.code.splitlines():
                if line and not line.startswith(':'):
                    yield str(block), f'{line}.md'


@pytest.mark.parametrize('page', PAGES)
def test_files_that_a_page_names_are_there(page, sandbox):
    folder = sandbox(page).root
    beside = (folder / page).parent
    missing = [
        f'{where}: {name}'
        for where, name in names(page)
        if not (folder / name.rstrip('.')).exists() and not (beside / name).exists()
    ]
    assert not missing


@pytest.mark.parametrize('page', PAGES)
def test_sections_that_a_link_names_are_there(page):
    for text in texts(page):
        address, _, section = text.text.partition('#')
        if text.kind != 'link' or not section or re.match('https?:', address):
            continue
        target = (ROOT / page).parent / address if address else ROOT / page
        titles = re.findall(r'^#+ (.+)$', target.read_text(), re.MULTILINE)
        anchors = {re.sub(r'[^\w -]', '', t).lower().replace(' ', '-') for t in titles}
        assert section in anchors, str(text)


@pytest.mark.parametrize('page', PAGES)
def test_make_targets_that_a_page_names_are_there(page):
    makefile = (ROOT / 'Makefile').read_text()
    text = (ROOT / page).read_text()
    for target in re.findall(r'(?:^|`)make ([a-z-]+)', text, re.MULTILINE):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


def test_files_are_found_wherever_a_page_names_them():
    found = [name for _, name in names('README.md')]
    assert 'docs/images/demo_curves.png' in found  # a link
    assert 'mdeq_mm/implicit/' in found  # inline code
    assert 'tools/analysis_tools/anytime.py' in found  # a block
    found = [name for _, name in names('docs/migration.md')]
    # Of the other project, and ours.
    assert 'tools/cls_train.py' not in found and 'tools/dist_train.sh' in found
