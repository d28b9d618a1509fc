"""Refuses to start where the installed packages are missing or known not to work.

Without this check such an environment fails too, but later and with a message
about something else. :func:`find_problem` holds the rules and looks at nothing
but its arguments; :func:`check_installation` asks it about this environment.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# Which distributions provide a module. Those of one line overwrite each other.
PROVIDERS = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
}
OTHERS = ('torch', 'torchvision', 'setuptools')

# mmpretrain and mmseg are each optional.
REQUIRED = ('torch', 'mmengine', 'mmcv')

MINIMUM_PYTHON = (3, 11)
MINIMUM = {
    # Gradient edges as outputs, and the list of types that checkpoints may hold.
    'torch': (2, 6),
    'mmengine': (0, 10),
    'mmcv': (2, 0),
    'mmpretrain': (1, 0),
    'mmseg': (1, 0),
}

ONEDL = (
    'pip install torch torchvision onedl-mmengine onedl-mmcv onedl-mmpretrain '
    'onedl-mmsegmentation'
)
OPENMMLAB = (
    'torch, mmengine 0.10.7, mmcv 2.1.0, mmpretrain 1.2.0 and mmsegmentation 1.2.2, '
    'in the way that docs/installation.md shows'
)


def check_installation():
    """Check the packages of this environment.

    Raises:
        ImportError: If a required package is missing, or a version or a
            combination is known not to work. The message is one sentence that
            names the package, its version and the remedy.
    """
    problem = find_problem(
        installed_versions(), has_module, import_error, sys.version_info[:3]
    )
    if problem:
        raise ImportError(problem)


def find_problem(versions, has_module, import_error, python):
    """Find the first reason why an environment cannot work.

    Args:
        versions (Mapping[str, str]): Version of each installed distribution
            among those of :data:`PROVIDERS` and :data:`OTHERS`.
        has_module (Callable[[str], bool]): Whether a module can be found; a
            dotted name is looked up without importing its parent.
        import_error (Callable[[str], Exception | None]): Imports a module and
            returns what it raised.
        python (tuple[int, ...]): Version of the interpreter.

    Returns:
        str | None: One sentence with the remedy, or None.
    """
    return (
        _old_python(python)
        or _overwritten(versions)
        or _missing(versions, has_module)
        or _too_old(versions)
        or _no_pkg_resources(versions, has_module)
        or _mmseg_without_its_mmcv(versions, has_module)
        or _unfit_torchvision(versions, import_error)
    )


def installed_versions():
    """Versions of the distributions that the check looks at, where installed."""
    names = [name for names in PROVIDERS.values() for name in names]
    found = {}
    for name in (*names, *OTHERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def has_module(name):
    """Whether a module can be found, without importing it or its parent."""
    parent, _, child = name.rpartition('.')
    if not parent:
        return find_spec(name) is not None
    spec = find_spec(parent)
    locations = spec.submodule_search_locations if spec else None
    return bool(child and locations and PathFinder.find_spec(name, locations))


def import_error(name):
    """Import a module and return what it raised, or None."""
    try:
        import_module(name)
    except Exception as error:
        return error
    return None


def _release(text):
    """The numbers of a version: 2.6.0a0+git1 counts as 2.6.0, as in containers."""
    # The sets bring packaging. A bare interpreter does not, and ends before this.
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text).release
    except (InvalidVersion, TypeError):
        return None


def _before(text, limit):
    release = _release(text)
    return release is not None and release[: len(limit)] < limit


def _provider(versions, module):
    """The installed distribution that provides a module, and its version."""
    for name in PROVIDERS.get(module, (module,)):
        if name in versions:
            return name, versions[name]
    return None, None


def _old_python(python):
    if python >= MINIMUM_PYTHON:
        return None
    here, least = ('.'.join(map(str, v)) for v in (python, MINIMUM_PYTHON))
    return (
        f'mdeq_mm needs Python {least} or later and this is Python {here}: create an '
        f'environment with Python {least} or 3.12.'
    )


def _overwritten(versions):
    for module, names in PROVIDERS.items():
        found = [name for name in names if name in versions]
        if len(found) < 2:
            continue
        listed = ' and '.join(f'{name} {versions[name]}' for name in found)
        every = [n for names in PROVIDERS.values() for n in names if n in versions]
        return (
            f'{listed} are installed in one environment and overwrite each other, '
            f'since both provide the module {module}: run "pip uninstall -y '
            f'{" ".join(every)}", then install one set, either OneDL\'s ({ONEDL}) or '
            f'the original one ({OPENMMLAB}).'
        )
    return None


def _missing(versions, has_module):
    lacking = [module for module in REQUIRED if not has_module(module)]
    for module in lacking:
        name, number = _provider(versions, module)
        if name:
            return (
                f'{name} {number} is recorded as installed but its module {module} '
                'is not there, as happens when the package of another set that '
                'overwrote it was removed: run "pip install --force-reinstall '
                f'--no-deps {name}=={number}".'
            )
    if not lacking:
        return None
    return (
        f'mdeq_mm cannot find {", ".join(lacking)}: install one set of packages, '
        f"either OneDL's ({ONEDL}) or the original one of OpenMMLab ({OPENMMLAB}), "
        'and never both in one environment.'
    )


def _too_old(versions):
    for module, least in MINIMUM.items():
        name, number = _provider(versions, module)
        if name and _before(number, least):
            wanted = '.'.join(map(str, least))
            if name == 'mmcv-full':
                remedy = 'run "pip uninstall -y mmcv-full", then install mmcv 2.1.0'
            else:
                remedy = f'run "pip install \'{name}>={wanted}\'"'
            return (
                f'{name} {number} is too old for mdeq_mm, which needs {module} '
                f'{wanted} or later: {remedy}.'
            )
    return None


def _no_pkg_resources(versions, has_module):
    number = versions.get('mmengine')
    if not number or not _before(number, (0, 10, 8)) or has_module('pkg_resources'):
        return None
    setuptools = versions.get('setuptools')
    state = f'setuptools {setuptools} dropped' if setuptools else 'is not installed'
    return (
        f'mmengine {number} imports pkg_resources, which {state}: run '
        '"pip install \'setuptools<81\'".'
    )


def _mmseg_without_its_mmcv(versions, has_module):
    number = versions.get('mmsegmentation')
    name, mmcv = _provider(versions, 'mmcv')
    if not number or not name or not _before(number, (1, 3)):
        return None
    if not _before(mmcv, (2, 2)):
        return (
            f'mmsegmentation {number} refuses {name} {mmcv}: install mmcv 2.1.0 in the '
            'way that docs/installation.md shows, or uninstall mmsegmentation if no '
            'segmentation is needed.'
        )
    if not has_module('mmcv._ext'):
        return (
            f'mmsegmentation {number} imports mmcv.ops, and {name} {mmcv} comes '
            f'without compiled operators: run "pip uninstall -y {name}" and compile '
            'mmcv 2.1.0 in the way that docs/installation.md shows, or uninstall '
            'mmsegmentation if no segmentation is needed.'
        )
    return None


def _unfit_torchvision(versions, import_error):
    torch, vision = versions.get('torch'), versions.get('torchvision')
    if not torch or not vision:
        return None
    # torch 2.N belongs to torchvision 0.(N + 15), built for the same hardware,
    # which a local version such as +cpu names. Importing it takes a second, so
    # only a pair that looks odd is tried.
    torch_minor, vision_minor = ((_release(v) or ())[1:2] for v in (torch, vision))
    paired = [number + 15 for number in torch_minor] == list(vision_minor)
    if paired and torch.partition('+')[2] == vision.partition('+')[2]:
        return None
    error = import_error('torchvision')
    if error is None:
        return None
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f'torchvision {vision} cannot be imported beside torch {torch} ({reason}): '
        'install two that were published together, as with "pip install '
        'torch===2.14.1 torchvision===0.29.1".'
    )
