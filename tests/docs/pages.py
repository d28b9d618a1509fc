"""The pages, and what stands in them: blocks, inline code, links."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
# Names of the pages, relative to the repository.
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / 'README.md',
        ROOT / 'CONTRIBUTING.md',
        *sorted(ROOT.glob('docs/*.md')),
        *sorted(ROOT.glob('configs/*/README.md')),
    )
]
SHELL = ('bash', 'shell')
# The first columns of the tables of this page hold names of another project.
FOREIGN = 'docs/migration.md'
# Stands for what a page leaves out of a config.
LEFT_OUT = 'left_out'


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page (str): Relative to the repository.
        line (int): Of its fence, from 1.
        language (str): '' where none is said.
        code (str): Its lines.
        before (str): The paragraph before it.
        reason (str | None): Why it is not run, if a comment before it says so.
    """

    page: str
    line: int
    language: str
    code: str
    before: str
    reason: str | None

    def __str__(self):
        return f'{self.page}:{self.line}'


@dataclass(frozen=True)
class Text:
    """A piece of a page outside of blocks: inline code, or the address of a link."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self):
        return f'{self.page}:{self.line}'


@cache
def tokens(page):
    return MarkdownIt('commonmark').enable('table').parse((ROOT / page).read_text())


@cache
def blocks(page):
    """All blocks of a page, in order."""
    found, before, reason = [], '', None
    for token in tokens(page):
        if token.type == 'fence':
            line = token.map[0] + 1
            language = token.info.strip()
            found.append(Block(page, line, language, token.content, before, reason))
        elif token.type == 'code_block':
            found.append(
                Block(page, token.map[0] + 1, 'indented', token.content, before, reason)
            )
        if token.type == 'inline':
            before = token.content
        comment = re.match(r'<!-- not run: (.+?) -->', token.content, re.DOTALL)
        reason = comment[1] if token.type == 'html_block' and comment else None
    return tuple(found)


@cache
def texts(page):
    """Inline code and links of a page, without names of another project."""
    found, column = [], None
    for token in tokens(page):
        if token.type in ('tr_open', 'tr_close'):
            column = 0 if token.type == 'tr_open' else None
        elif token.type in ('td_open', 'th_open'):
            column += 1
        if token.type != 'inline' or (page == FOREIGN and column == 1):
            continue
        line = (token.map[0] if token.map else 0) + 1
        for child in token.children:
            if child.type == 'code_inline':
                found.append(Text(page, line, 'code', child.content))
            elif child.type == 'text':
                found.append(Text(page, line, 'text', child.content))
            elif child.type in ('link_open', 'image'):
                address = child.attrs.get('href') or child.attrs.get('src')
                found.append(Text(page, line, 'link', address))
    return tuple(found)


def pages_with(*languages):
    """Pages that have blocks of some languages that are run."""
    return [
        page
        for page in PAGES
        if any(b.language in languages and b.reason is None for b in blocks(page))
    ]


def parseable(code):
    """Code of a config, with names in the place of what is not quite Python.

    That is ``{{_base_.name}}``, and ``...`` after arguments with names.
    """
    code = re.sub(r'\{\{(.*?)\}\}', r'\1', code)
    return re.sub(r',(\s*)\.\.\.(,?\s*)\)', rf',\1**{LEFT_OUT}\2)', code)


def kind(block):
    """What a Python block is.

    Returns:
        str: ``'template'``, a config with ``...`` for what is left out; ``'config'``,
        assignments alone; or ``'script'``.
    """
    tree = ast.parse(parseable(block.code))
    nodes = list(ast.walk(tree))
    if any(isinstance(n, ast.Constant) and n.value is Ellipsis for n in nodes):
        return 'template'
    if any(isinstance(n, ast.Name) and n.id == LEFT_OUT for n in nodes):
        return 'template'
    if all(isinstance(n, ast.Assign) for n in tree.body):
        return 'config'
    return 'script'


def config_place(block):
    """Where a config is to be saved, relative to the repository."""
    named = re.search(r'[Ss]ave this as `(.+?\.py)`', block.before)
    if named:
        return named[1]
    base = re.search(r"^_base_ = '\./(.+)'", block.code, re.MULTILINE)
    name = f'snippet_{Path(block.page).stem}_{block.line}.py'
    if base:
        (path,) = ROOT.glob(f'configs/*/{base[1]}')
        return path.with_name(name).relative_to(ROOT).as_posix()
    return name
