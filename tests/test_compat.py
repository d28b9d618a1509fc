"""The environment check refuses what is missing or known not to work."""

import subprocess
import sys

import pytest

from mdeq_mm import compat

ONEDL = {
    'torch': '2.14.1',
    'torchvision': '0.29.1',
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmpretrain': '1.3.6',
    'onedl-mmsegmentation': '1.4.2',
    'setuptools': '84.2.1',
}
ORIGINAL = {
    'torch': '2.13.0',
    'torchvision': '0.28.0',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmpretrain': '1.2.0',
    'mmsegmentation': '1.2.2',
    'setuptools': '80.9.0',
}


def find(versions, absent=(), error=None, python=(3, 11, 7)):
    """Ask about an environment where every module is there but those absent."""
    return compat.find_problem(
        versions, lambda name: name not in absent, lambda name: error, python
    )


def without(versions, *names):
    return {name: number for name, number in versions.items() if name not in names}


@pytest.mark.parametrize(
    'versions, absent',
    [
        (ONEDL, ('mmcv._ext', 'pkg_resources')),
        (ORIGINAL, ()),
        (without(ONEDL, 'onedl-mmpretrain'), ('mmpretrain',)),
        (without(ORIGINAL, 'mmsegmentation'), ('mmseg', 'mmcv._ext')),
        # Modules on PYTHONPATH, which no metadata describes.
        ({}, ()),
        # Builds from source and of vendors carry versions such as these.
        (ONEDL | {'torch': '2.6.0a0+07cecf4', 'torchvision': '0.21.0a0'}, ()),
        (ONEDL | {'torch': 'unknown'}, ()),
        (ORIGINAL | {'mmpretrain': '1.0.0rc8'}, ()),
    ],
)
def test_fit_environments_pass(versions, absent):
    assert find(versions, absent) is None
    assert find(versions, absent, python=(3, 12, 0)) is None


@pytest.mark.parametrize(
    'versions, absent, words',
    [
        # Nothing at all: both sets are offered.
        ({}, ('torch', 'mmengine', 'mmcv'), ['torch, mmengine, mmcv', 'onedl-mmcv',
                                             'mmcv 2.1.0', 'never both']),
        ({'torch': '2.14.1'}, ('mmengine', 'mmcv'), ['find mmengine, mmcv']),
        (without(ONEDL, 'torch'), ('torch',), ['find torch', 'pip install torch']),
        # Both sets, or two packages that provide the same module.
        (ONEDL | ORIGINAL, (), ['onedl-mmengine 0.10.12 and mmengine 0.10.7',
                                'pip uninstall -y onedl-mmengine mmengine onedl-mmcv '
                                'mmcv onedl-mmpretrain mmpretrain '
                                'onedl-mmsegmentation mmsegmentation']),
        (ORIGINAL | {'mmcv-lite': '2.1.0'}, (), ['mmcv 2.1.0 and mmcv-lite 2.1.0']),
        # Removing one of them took the other's files along.
        (ONEDL, ('mmengine',), ['onedl-mmengine 0.10.12 is recorded',
                                '--force-reinstall --no-deps onedl-mmengine==0.10.12']),
        # Too old.
        (ONEDL | {'torch': '2.5.1'}, (), ['torch 2.5.1', "'torch>=2.6'"]),
        (ORIGINAL | {'mmengine': '0.9.1'}, (), ['mmengine 0.9.1', "'mmengine>=0.10'"]),
        (ORIGINAL | {'mmcv': '1.7.2'}, (), ['mmcv 1.7.2', "'mmcv>=2.0'"]),
        (without(ORIGINAL, 'mmcv') | {'mmcv-full': '1.7.2'}, (),
         ['mmcv-full 1.7.2', 'pip uninstall -y mmcv-full', 'mmcv 2.1.0']),
        (ORIGINAL | {'mmpretrain': '0.9.0'}, (), ['mmpretrain 0.9.0', '>=1.0']),
        (ORIGINAL | {'mmsegmentation': '0.30.0'}, (),
         ['mmsegmentation 0.30.0', "'mmsegmentation>=1.0'"]),
        # The original set's own traps.
        (ORIGINAL | {'setuptools': '81.0.0'}, ('pkg_resources',),
         ['mmengine 0.10.7', 'setuptools 81.0.0', "'setuptools<81'"]),
        (without(ORIGINAL, 'setuptools'), ('pkg_resources',),
         ['is not installed', "'setuptools<81'"]),
        (ORIGINAL | {'mmcv': '2.2.0'}, (),
         ['mmsegmentation 1.2.2', 'mmcv 2.2.0', 'mmcv 2.1.0']),
        (without(ORIGINAL, 'mmcv') | {'mmcv-lite': '2.1.0'}, ('mmcv._ext',),
         ['mmcv-lite 2.1.0', 'mmcv.ops', 'uninstall mmsegmentation']),
    ],
)  # fmt: skip
def test_unfit_environments_are_refused_in_one_sentence(versions, absent, words):
    problem = find(versions, absent)
    for word in words:
        assert word in problem
    assert problem.endswith('.') and '. ' not in problem and '\n' not in problem


def test_old_python_is_refused():
    problem = find(ONEDL, python=(3, 10, 13))
    assert 'Python 3.10.13' in problem and 'Python 3.11' in problem


def test_cpu_torch_beside_published_torchvision_is_refused_if_it_fails():
    error = RuntimeError('operator torchvision::nms does not exist\nmore lines')
    versions = ORIGINAL | {'torch': '2.13.0+cpu'}
    problem = find(versions, error=error)
    assert 'torch 2.13.0+cpu' in problem
    assert '(operator torchvision::nms does not exist)' in problem
    assert '\n' not in problem
    # The same pair on a machine where it can be imported is left alone.
    assert find(versions) is None


def test_torchvision_of_another_torch_is_refused_if_it_fails():
    versions = ONEDL | {'torchvision': '0.25.0'}
    assert 'torchvision 0.25.0' in find(versions, error=OSError('undefined symbol'))


def test_matching_torchvision_is_not_imported():
    # Importing it takes a second, which every start would pay.
    def never(name):
        raise AssertionError(name)

    cpu = {'torch': '2.14.1+cpu', 'torchvision': '0.29.1+cpu'}
    for versions in (ONEDL, ORIGINAL, ONEDL | cpu):
        assert compat.find_problem(versions, bool, never, (3, 11)) is None


def test_probes_look_at_this_environment():
    versions = compat.installed_versions()
    assert ('mmengine' in versions) != ('onedl-mmengine' in versions)
    assert 'torch' in versions
    assert compat.has_module('mmcv.cnn')
    assert not compat.has_module('mmcv.no_such_module')
    assert not compat.has_module('no_such_package.module')
    assert compat.import_error('json') is None
    assert isinstance(compat.import_error('no_such_package'), ImportError)
    compat.check_installation()


def test_looking_for_a_submodule_does_not_import_its_parent():
    code = (
        'import sys; from mdeq_mm import compat; compat.has_module("mmseg.apis");'
        'sys.exit("mmseg" in sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_import_without_any_package_ends_in_one_sentence(repo_root):
    code = f'import sys; sys.path.insert(0, {str(repo_root)!r}); import mdeq_mm'
    # -S leaves site-packages out, and with them everything that was installed.
    result = subprocess.run(
        [sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: mdeq_mm cannot find torch, mmengine, mmcv:')
    assert result.stderr.count('Traceback') == 1


@pytest.mark.parametrize('absent', ['mmpretrain', 'mmseg'])
def test_each_toolbox_is_optional(absent):
    code = f'import sys; sys.modules[{absent!r}] = None; import mdeq_mm'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
