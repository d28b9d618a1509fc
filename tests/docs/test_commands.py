"""Every command of the pages, in blocks and in the text: the tools know what it says.

Nothing is run: the shell expands the commands, and the tools' own parsers read what
they are given. The slow tests of ``test_bash_blocks.py`` run the blocks.
"""

import argparse
import contextlib
import importlib.util
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config

from tests.docs import dry_pip
from tests.docs.pages import PAGES, ROOT, SHELL, blocks, texts
from tests.docs.sandbox import Sandbox
from tests.docs.settings import unknown_setting
from tests.helpers import load_tool

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

TOOLS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob('tools/**/*.py')
    if 'parse_args' in path.read_text() and "'__main__'" in path.read_text()
)
# Options in the text that are those of other programs.
OTHERS = ('--no-deps', '--no-build-isolation', '--help')
COMMAND = re.compile(r'([A-Z_]+=\S+ )*(python|bash|pip|make|tools/\w+\.sh) ')


class Captured(Exception):
    """Ends a tool where it would parse its arguments."""


@cache
def parser_of(path):
    """The parser of a script, or of a module where the name has no suffix."""
    before, known = sys.path[:], set(sys.modules)

    def capture(parser, *args, **kwargs):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', capture)
        patch.setattr(sys, 'argv', [path])
        try:
            if path.endswith('.py'):
                sys.path.insert(0, str((ROOT / path).parent))
                runpy.run_path(str(ROOT / path), run_name='__main__')
            else:
                runpy.run_module(path, run_name='__main__')
        except Captured as found:
            return found.args[0]
        finally:
            sys.path[:] = before
            # Scripts in different folders call their parts alike.
            for name in set(sys.modules) - known:
                file = getattr(sys.modules[name], '__file__', None) or ''
                if file.startswith((str(ROOT / 'tools'), str(ROOT / 'dev'))):
                    del sys.modules[name]
    raise AssertionError(f'{path} parses no arguments')


@cache
def digit_files():
    """Files of data/digits, whether or not a page has made it yet."""
    digits, parts = load_tool('tools/dataset_converters/digits.py').split_digits()
    return {
        f'{split}/{digits.target[number]}/{number:04d}.png'
        for split, numbers in parts.items()
        for number in numbers
    }


def check_python(words, root):
    """Check what ``python`` is given, as :func:`check` does."""
    while words[0] == '-u':
        words = words[1:]
    if words[:2] == ['-m', 'torch.distributed.run']:
        words = [
            w for w in words[2:] if not re.match('--(nnodes|node_rank|nproc|master)', w)
        ]
    if words[0] == '-m':
        name, words = words[1], words[2:]
        spec = importlib.util.find_spec(name)
        assert spec, f'there is no module {name}'
        if spec.submodule_search_locations:
            spec = importlib.util.find_spec(f'{name}.__main__')
        if 'parse_args' not in Path(spec.origin).read_text():
            assert not words, f'{name} takes no arguments'
            return
    else:
        name, words = words[0].removeprefix(f'{root}/'), words[1:]
        assert (root / name).is_file(), f'there is no {name}'
    args = parser_of(name).parse_args(words)
    for word in words:
        if re.match('(configs|tools|dev)/', word):
            assert (root / word).exists(), f'there is no {word}'
        if re.match(r'data/digits/.+\.png', word):
            assert word.removeprefix('data/digits/') in digit_files(), word
    options = getattr(args, 'cfg_options', None)
    config = getattr(args, 'config', None)
    if isinstance(options, dict) and config and (root / config).is_file():
        cfg = Config.fromfile(root / config)
        wrong = [unknown_setting(cfg, key) for key in options]
        assert not any(wrong), '; '.join(filter(None, wrong))


def commands(page):
    """Blocks of a shell, and what is a command in the text."""
    for block in blocks(page):
        if block.language in SHELL:
            yield str(block), block.code, block.reason
    for text in texts(page):
        if text.kind == 'code' and COMMAND.match(f'{text.text} '):
            yield str(text), text.text, None


def check(program, words, root):
    """Check what a program is given.

    Raises:
        AssertionError, SystemExit: If it could not be run like this.
    """
    if words[:2] == ['-m', 'pip']:
        program, words = 'pip', words[2:]
    if program == 'pip':
        with contextlib.chdir(root):
            dry_pip.check(words)
    elif program == 'python' and words:
        check_python(words, root)
    elif program == 'make':
        makefile = (root / 'Makefile').read_text()
        for word in words:
            target = re.match(r'[\w-]+$', word)
            assert not target or f'\n{word}:' in makefile, f'no target {word}'


@pytest.mark.parametrize('page', [p for p in PAGES if any(commands(p))])
def test_commands(page, sandbox, capsys):
    folder = sandbox(page)
    folder.run_dry()
    wrong = []
    for where, code, reason in commands(page):
        if reason or '…' in code or '...' in code:
            continue
        try:
            for program, *words in folder.said(folder.fill(code)):
                check(program, words, folder.root)
        except (AssertionError, SystemExit) as error:
            wrong.append(f'{where}: {error} {capsys.readouterr().err}')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize(
    ('command', 'said'),
    [
        ('python tools/none.py', 'there is no tools/none.py'),
        ('python -m mdeq_mm.none', 'there is no module'),
        ('python tools/train.py CONFIG --none', 'unrecognized arguments: --none'),
        ('python tools/train.py configs/none.py', 'there is no configs/none.py'),
        ('python tools/test.py CONFIG', 'required: checkpoint'),
        ('tools/dist_train.sh CONFIG 2 --none', 'unrecognized arguments: --none'),
        ('tools/slurm_train.sh a b CONFIG --none', 'unrecognized arguments: --none'),
        ('python tools/train.py CONFIG --cfg-options a.b=1', 'the config has no a'),
        ('python tools/train.py CONFIG --cfg-options default_hooks.data.a=1',
         'default_hooks.data has no a'),
        ('python tools/train.py CONFIG --cfg-options train_cfg.max_epoch=1',
         'train_cfg has no max_epoch'),
        ('python tools/train.py CONFIG --cfg-options param_scheduler.7.end=1',
         'param_scheduler has 2 entries'),
        ('python tools/demo/image_demo.py data/digits/test/3/0000.png CONFIG',
         'data/digits/test/3/0000.png'),
        ('pip install -r none.txt', 'there is no file none.txt'),
        ('pip install "/path/to/mdeq_mm[none]"', 'no extra none'),
        ('pip install mmcv==0.1', 'another version than mmcv==0.1'),
        ('make none', 'no target none'),
        ('none', 'none: command not found'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(command, said, wrong_page, capsys):
    with pytest.raises((AssertionError, SystemExit)) as error:
        for program, *words in wrong_page.said(wrong_page.fill(command)):
            check(program, words, wrong_page.root)
    assert said in f'{error.value} {capsys.readouterr().err}'


@pytest.fixture(scope='module')
def wrong_page(page_data, tmp_path_factory):
    folder = Sandbox(tmp_path_factory.mktemp('wrong') / 'mdeq_mm', page_data, PAGES[1])
    folder.run_dry()
    return folder


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


@cache
def every_option():
    return set().union(*(options_of(parser_of(path)) for path in TOOLS))


@pytest.mark.parametrize('page', PAGES)
def test_options_in_the_text(page):
    named = {
        option
        for text in texts(page)
        if text.kind == 'code' and not COMMAND.match(text.text)
        for option in re.findall(r'(?<![\w-])--[a-z][\w-]*', text.text)
    }
    assert named - every_option() - set(OTHERS) == set()


# Between them they have every setting that the pages name.
KNOWN = (
    'imagenet/mdeq-small_4xb32-100e_in1k.py',
    'cityscapes/fcn_mdeq-small_4xb3-124k_cityscapes-512x1024.py',
    'demo/mdeq_jacobian_1xb64-30e_digits.py',
    'demo/mdeq-joint_1xb16-12e_digits.py',
)
FIELDS = (
    'default_hooks|env_cfg|model|optim_wrapper|randomness|train_cfg|train_dataloader'
)


@cache
def known_configs():
    return [Config.fromfile(ROOT / 'configs' / name) for name in KNOWN]


@pytest.mark.parametrize('page', PAGES)
def test_settings_in_the_text(page):
    """What is called by its place in a config is there, or its class takes it."""
    wrong = {}
    for text in texts(page):
        if text.kind != 'code':
            continue
        for key in re.findall(rf'(?<![\w./`-])((?:{FIELDS})(?:\.\w+)+)', text.text):
            said = [unknown_setting(cfg, key) for cfg in known_configs()]
            if all(said):
                wrong[str(text)] = said
    assert not wrong
