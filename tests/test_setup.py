"""Packaging, requirements, Makefile and the set-up script."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import mdeq_mm
from mdeq_mm.compat import installed_versions

SET = re.compile(r'(onedl-)?(mmengine|mmcv|mmpretrain|mmsegmentation|mmcv-lite)\b')
STACK = 'onedl' if 'onedl-mmengine' in installed_versions() else 'openmmlab'
PINNED = [
    'onedl', 'openmmlab', 'build', 'demo', 'tests', 'lint', 'benchmark', 'docs',
    'deployment', 'visualization',
]  # fmt: skip


def run(*command, cwd, env=None, **variables):
    env = dict(os.environ if env is None else env, **variables)
    # What a surrounding make was told is not for this one.
    for name in ('MAKEFLAGS', 'MFLAGS', 'MAKEOVERRIDES', 'STACK'):
        env.pop(name, None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


def requirements(repo_root, name):
    text = (repo_root / 'requirements' / f'{name}.txt').read_text()
    lines = [line.split('#')[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


def clean_pip():
    """An environment in which pip knows no index, cache or setting of the user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith('PIP_')}
    return kept | {'PIP_CONFIG_FILE': os.devnull, 'PIP_NO_INDEX': '1'}


@pytest.fixture(scope='module')
def copy(repo_root, tmp_path_factory):
    """What packaging reads, in a folder that a build may write to."""
    target = tmp_path_factory.mktemp('copy') / 'a checkout'
    target.mkdir()
    ignore = shutil.ignore_patterns('__pycache__', '.*_cache', '.mim')
    for name in ('mdeq_mm', 'configs', 'tools', 'requirements'):
        shutil.copytree(repo_root / name, target / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'Makefile',
                 'README.md', 'CHANGELOG.md', 'CITATION.cff',
                 'model-index.yml'):  # fmt: skip
        if (repo_root / name).exists():
            shutil.copy(repo_root / name, target / name)
    return target


class TestRequirements:
    @pytest.mark.parametrize('name', PINNED)
    def test_what_make_installs_is_pinned_exactly(self, repo_root, name):
        lines = requirements(repo_root, name)
        assert lines
        for line in lines:
            assert re.fullmatch(r'[A-Za-z0-9-]+={2,3}[0-9][0-9.]*', line), line

    @pytest.mark.parametrize('name', ['onedl', 'openmmlab'])
    def test_torch_is_pinned_to_the_published_build(self, repo_root, name):
        lines = requirements(repo_root, name)
        assert {line.split('===')[0] for line in lines if '===' in line} == {
            'torch',
            'torchvision',
        }

    def test_each_set_holds_its_own_packages_alone(self, repo_root):
        onedl, openmmlab = (
            {line.split('=')[0] for line in requirements(repo_root, name)}
            for name in ('onedl', 'openmmlab')
        )
        packages = {'mmengine', 'mmcv', 'mmpretrain', 'mmsegmentation'}
        assert {n for n in onedl if SET.match(n)} == {f'onedl-{n}' for n in packages}
        assert {n for n in openmmlab if SET.match(n)} == packages

    def test_every_file_is_known_to_these_tests(self, repo_root):
        files = {p.stem for p in (repo_root / 'requirements').glob('*.txt')}
        assert files == {*PINNED, 'runtime'}

    def test_plugin_requires_nothing_that_a_set_provides(self, repo_root):
        assert requirements(repo_root, 'runtime') == ['torch>=2.6']


class TestPackage:
    def test_installed_metadata(self):
        assert version('mdeq_mm') == mdeq_mm.__version__ == '0.2.0'
        plain = [line for line in requires('mdeq_mm') if 'extra ==' not in line]
        assert plain == ['torch>=2.6']
        extra = [line for line in requires('mdeq_mm') if SET.match(line)]
        assert len(extra) == 4
        assert all('onedl' in line.split(';')[1] for line in extra)

    def test_version_is_the_same_everywhere(self, repo_root):
        changes = (repo_root / 'CHANGELOG.md').read_text()
        # The topmost entry.
        (released, date), *_ = re.findall(r'^## (\S+), (\S+)$', changes, re.MULTILINE)
        citation = (repo_root / 'CITATION.cff').read_text()
        assert f'\nversion: {released}\n' in citation
        assert f'\ndate-released: {date}\n' in citation
        assert released == mdeq_mm.__version__

    def test_installing_changes_nothing_else(self, copy):
        # Without --no-deps: everything that it requires is there, with the extra
        # too, so that pip, which has no index here, has the plugin alone to add.
        command = '-m pip install --dry-run --no-build-isolation'.split()
        for what in ('.', '.[onedl]') if STACK == 'onedl' else ('.',):
            found = run(sys.executable, *command, what, cwd=copy, env=clean_pip())
            assert found.returncode == 0, found.stderr
            assert re.findall(r'Would install (.*)', found.stdout) == ['mdeq_mm-0.2.0']

    def test_version_is_read_without_importing_the_package(self, copy):
        code = (
            'import sys, setuptools; sys.modules["torch"] = None;'
            'sys.argv = ["setup.py", "--version"]; exec(open("setup.py").read(),'
            '{"__file__": "setup.py", "__name__": "__main__"});'
            'assert "mdeq_mm" not in sys.modules'
        )
        found = run(sys.executable, '-W', 'ignore', '-c', code, cwd=copy)
        assert found.stdout.split() == ['0.2.0'], found.stderr

    def test_wheel_and_sdist_ship_configs_and_tools(self, copy, tmp_path):
        for name in ('.ruff_cache/CACHEDIR.TAG', '__pycache__/runtime.pyc'):
            leftover = copy / 'configs' / '_base_' / name
            leftover.parent.mkdir()
            leftover.touch()
        code = (
            'from setuptools import build_meta as b; import sys; to = sys.argv[1];'
            'b.build_wheel(to); b.build_sdist(to)'
        )
        built = run(sys.executable, '-c', code, tmp_path, cwd=copy)
        assert built.returncode == 0, built.stderr

        with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
            names = wheel.namelist()
            (metadata,) = (n for n in names if n.endswith('/METADATA'))
            header = wheel.read(metadata).decode()
        assert 'mdeq_mm/compat.py' in names
        assert 'mdeq_mm/.mim/configs/_base_/default_runtime.py' in names
        assert 'mdeq_mm/.mim/tools/train.py' in names
        # What only a checkout has a use for.
        assert not any('/dev/' in name or '/tests/' in name for name in names)
        assert any(n.endswith('LICENSE') for n in names)
        assert not any('cache' in name for name in names)
        assert {n.split('/')[0] for n in names} == {
            'mdeq_mm',
            'mdeq_mm-0.2.0.dist-info',
        }
        assert 'Requires-Python: >=3.11' in header
        assert 'License: Apache-2.0' in header

        with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as sdist:
            names = {n.partition('/')[2] for n in sdist.getnames()}
        assert {'requirements/onedl.txt', 'configs/_base_/default_runtime.py',
                'tools/train.py', 'setup.py', 'LICENSE', 'CHANGELOG.md',
                'CITATION.cff', 'model-index.yml'} <= names  # fmt: skip
        assert not any('cache' in name for name in names)
        # Weights and logs too, which the metafiles name.
        shipped = {
            path.relative_to(copy).as_posix()
            for path in (copy / 'configs').rglob('*')
            if path.is_file() and 'cache' not in str(path.relative_to(copy))
        }
        assert any(path.endswith('.json') for path in shipped)
        assert shipped <= names


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
class TestMakefile:
    def test_help_is_the_default_and_names_every_target(self, repo_root):
        shown = run('make', cwd=repo_root)
        assert shown.returncode == 0, shown.stderr
        text = (repo_root / 'Makefile').read_text()
        phony = re.search(r'^\.PHONY: (.*)$', text, re.MULTILINE).group(1).split()
        assert {'setup', 'demo', 'test', 'lint', 'format', 'clean'} <= set(phony)
        for target in set(phony) - {'FORCE'}:
            assert re.search(rf'^  {target}  +\w', shown.stdout, re.MULTILINE), target

    @pytest.mark.parametrize(
        'options, folder', [([], '.venv'), (['STACK=openmmlab'], '.venv-openmmlab')]
    )
    def test_each_stack_has_its_own_environment(self, copy, options, folder):
        shown = run('make', '-n', 'demo', *options, cwd=copy)
        assert f'{folder}/bin/python tools/demo/digits_demo.py' in shown.stdout
        assert 'requirements/install.sh' in shown.stdout

    def test_sets_up_again_when_requirements_change_or_the_folder_moved(self, copy):
        def sets_up():
            shown = run('make', '-n', 'setup', 'ENV=.venv-made', cwd=copy)
            return 'install.sh' in shown.stdout

        stamp = copy / '.venv-made' / '.setup-done'
        stamp.parent.mkdir()
        assert sets_up()
        stamp.write_text(f'{copy}\n')
        assert not sets_up()
        changed = copy / 'requirements' / 'tests.txt'
        later = stamp.stat().st_mtime + 60
        os.utime(changed, (later, later))
        assert sets_up()
        os.utime(stamp, (later + 60, later + 60))
        assert not sets_up()
        stamp.write_text('/some/other/folder\n')
        os.utime(stamp, (later + 60, later + 60))
        assert sets_up()

    def test_clean_keeps_results_environments_and_compiled_wheels(self, copy):
        kept = ['work_dirs/demo/__pycache__/a', '.venv/lib/__pycache__/a',
                '.cache/wheels/a.whl', 'configs/a.py']  # fmt: skip
        gone = ['mdeq_mm/__pycache__/a', '.pytest_cache/a', 'build/a', '.hypothesis/a',
                'x.egg-info/a', 'configs/.ruff_cache/a']  # fmt: skip
        for name in kept + gone:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).touch()
        assert run('make', 'clean', cwd=copy).returncode == 0
        assert [n for n in kept if not (copy / n).exists()] == []
        assert [n for n in gone if (copy / n).exists()] == []


class TestInstallScript:
    """The script, run with interpreters that only report a version."""

    @pytest.fixture
    def install(self, repo_root, tmp_path):
        root, programs = tmp_path / 'root', tmp_path / 'programs'
        shutil.copytree(repo_root / 'requirements', root / 'requirements')
        programs.mkdir()
        for name in ('bash', 'dirname', 'cat', 'rm', 'env'):
            (programs / name).symlink_to(shutil.which(name))

        def install(*arguments, **interpreters):
            for name, does in interpreters.items():
                path = programs / name.replace('_', '.')
                path.write_text(f'#!{shutil.which("bash")}\n{does}\n')
                path.chmod(0o755)
            script = root / 'requirements' / 'install.sh'
            return run(
                'bash', script, *arguments, cwd=root, env={'PATH': str(programs)}
            )

        install.root = root
        install.programs = programs
        return install

    def refused(self, result):
        assert result.returncode != 0
        lines = [n for n in result.stderr.splitlines() if n.startswith('error: ')]
        assert len(lines) == 1, result.stderr
        return lines[0]

    def test_no_interpreter(self, install):
        message = self.refused(install('onedl', '.venv'))
        assert 'no Python 3.11 or 3.12' in message and 'make setup PYTHON=' in message
        assert not (install.root / '.venv').exists()

    def test_takes_the_first_that_runs_and_fits(self, install):
        # A launcher without an interpreter, one that fits, and a newer one. The
        # last argument list is that of the environment's creation.
        says = 'if [[ $1 == -c ]]; then echo {}; else echo "$0 $*" >&2; exit 3; fi'
        result = install(
            'onedl',
            '.venv',
            python3_11='echo not installed >&2; exit 127',
            python3_12=says.format('3.12'),
            python3=says.format('3.13'),
        )
        assert result.returncode == 3
        assert 'python3.12 -m venv --clear .venv' in result.stderr

    def test_only_unfit_interpreters(self, install):
        message = self.refused(install('onedl', '.venv', python3='echo 3.13'))
        assert 'no Python 3.11 or 3.12' in message

    @pytest.mark.parametrize(
        'wanted, words',
        [
            ('absent', 'PYTHON=absent cannot be run'),
            ('old', 'PYTHON=old is Python 3.9'),
        ],
    )
    def test_named_interpreter_is_not_replaced_by_another(self, install, wanted, words):
        result = install(
            'onedl', '.venv', wanted, old='echo 3.9', python3_11='echo 3.11'
        )
        assert words in self.refused(result)

    def test_unknown_stack(self, install):
        assert 'STACK=mmlab' in self.refused(install('mmlab', '.venv'))

    def environment(self, install, does):
        python = install.root / '.venv' / 'bin' / 'python'
        python.parent.mkdir(parents=True)
        python.write_text(f'#!{shutil.which("bash")}\n{does}\n')
        python.chmod(0o755)
        return python

    def test_environment_of_another_python(self, install):
        python = self.environment(install, 'echo 3.11')
        result = install('onedl', '.venv', 'python3.12', python3_12='echo 3.12')
        message = self.refused(result)
        assert '.venv holds Python 3.11' in message and 'make clean-env' in message
        assert python.exists()

    def test_environment_of_the_other_stack(self, install):
        python = self.environment(install, 'echo 3.11')
        message = self.refused(install('openmmlab', '.venv'))
        assert '.venv holds onedl-mmengine' in message and 'ENV=' in message
        assert python.exists()

    def test_set_up_in_progress_is_left_alone(self, install):
        python = self.environment(install, 'echo 3.11')
        mark = python.parents[1] / '.setup-running'
        mark.write_text(f'{os.getpid()}\n')
        message = self.refused(install('onedl', '.venv'))
        assert f'process {os.getpid()}' in message
        assert python.exists()

    def test_killed_set_up_starts_from_an_empty_environment(self, install):
        python = self.environment(install, 'echo 3.11')
        ended = subprocess.Popen([sys.executable, '-c', ''])
        ended.wait()
        mark = python.parents[1] / '.setup-running'
        mark.write_text(f'{ended.pid}\n')
        result = install('onedl', '.venv')
        assert '==> Removing .venv, where a set-up was interrupted' in result.stdout
        assert not python.exists()
        assert 'no Python 3.11' in self.refused(result)

    def test_failure_of_pip_shows_its_last_lines_and_can_be_repeated(self, install):
        self.environment(
            install,
            'case "$*" in\n'
            '*"pip install"*)\n'
            '    echo "Downloading a-1.0-py3.whl (9.5 MB)"; echo no network; exit 1;;\n'
            '*metadata*) exit 1;;\n'
            '*) echo 3.11;;\n'
            'esac',
        )
        for name in ('tee', 'awk', 'tail', 'sed'):
            (install.programs / name).symlink_to(shutil.which(name))
        for _ in range(2):
            result = install('onedl', '.venv')
            assert 'run the same command again' in self.refused(result)
            assert '    Downloading a 1.0 (9.5 MB)\n' in result.stdout
            assert 'no network' in result.stderr
            assert not (install.root / '.venv' / '.setup-done').exists()
            assert 'Removing' not in result.stdout


def test_ci_lints_before_it_tests(repo_root):
    script = repo_root / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert 'set -euo pipefail' in text
    assert 0 < text.index('make lint') < text.index('make test')


def test_license_is_apache_2(repo_root):
    text = Path(repo_root, 'LICENSE').read_text()
    assert 'Apache License' in text and 'END OF TERMS AND CONDITIONS' in text
