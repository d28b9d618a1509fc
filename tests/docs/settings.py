"""Whether what a config says is known to the classes that it names."""

import ast
import importlib
import inspect
from contextlib import contextmanager
from functools import cache

from mmengine import registry as root
from mmengine.runner import Runner

from mdeq_mm.registry import GRADIENTS, SOLVERS

# What mmengine itself reads in any dict of a config.
EVERYWHERE = {
    'type',
    '_delete_',
    '_scope_',
    'init_cfg',
    'priority',
    'convert_to_iter_based',
}

# Dicts that are handed on as they are.
FREE = ('test_cfg', 'metainfo', 'dist_cfg')


@cache
def import_toolboxes():
    """Let both toolboxes register what they have."""
    for toolbox in ('mmpretrain', 'mmseg'):
        for part in ('models', 'datasets', 'engine', 'evaluation', 'visualization'):
            importlib.import_module(f'{toolbox}.{part}')


def registries():
    """Those of mmengine, of both toolboxes and of this package."""
    import_toolboxes()
    roots = [r for r in vars(root).values() if isinstance(r, root.Registry)]
    children = [child for r in roots for child in r.children.values()]
    return [*roots, *children, SOLVERS, GRADIENTS]


def find_classes(name):
    """What is registered by a name; the toolboxes have some names in common.

    Args:
        name (str): With or without a scope.

    Returns:
        list[Callable]: Classes and functions.
    """
    name = name.rpartition('.')[2]
    return [r.module_dict[name] for r in registries() if name in r.module_dict]


def accepts(cls, argument):
    """Whether a class, or one that it hands other arguments to, takes an argument."""
    if not isinstance(cls, type):
        cls = type('Function', (), {'__init__': staticmethod(cls)})
    for base in cls.__mro__:
        start = vars(base).get('__init__')
        if start is None:
            continue
        start = start.__func__ if isinstance(start, staticmethod) else start
        parameters = inspect.signature(start).parameters
        if argument in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    # Handed on to something else than a base class.
    return True


def takes(name, argument):
    """Whether a class of that name takes an argument."""
    return any(accepts(cls, argument) for cls in find_classes(name))


def unknown_in(code):
    """What no registered class knows, of the ``dict(type=..., ...)`` of some code.

    Args:
        code (str): Python.

    Returns:
        list[str]: A sentence for each.
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or getattr(node.func, 'id', '') != 'dict':
            continue
        given = {word.arg: word.value for word in node.keywords if word.arg}
        if not isinstance(given.get('type'), ast.Constant):
            continue
        name = given['type'].value
        if not find_classes(name):
            found.append(f'{name} is not registered')
            continue
        found += [
            f'{name} has no argument {argument}'
            for argument in given.keys() - EVERYWHERE
            if not takes(name, argument)
        ]
    return found


def unknown_setting(cfg, key):
    """What is wrong with a key of ``--cfg-options``.

    mmengine adds a key that a config does not have, and nobody reads it.

    Args:
        cfg (Config): What it is merged into.
        key (str): With dots.

    Returns:
        str | None: A sentence.
    """
    node, parts = cfg, key.split('.')
    for i, part in enumerate(parts):
        where = '.'.join(parts[:i]) or 'the config'
        if isinstance(node, list | tuple):
            if not part.isdigit() or int(part) >= len(node):
                return f'{key}: {where} has {len(node)} entries'
            node = node[int(part)]
            continue
        if not isinstance(node, dict) and i:
            return f'{key}: {where} is no dict'
        if part in node:
            node = node[part]
            continue
        if i == 0:
            known = part in inspect.signature(Runner.__init__).parameters
            known = known or part == 'sync_bn'
            node = {}
        elif parts[0] == 'randomness':
            known = part in inspect.signature(Runner.set_randomness).parameters
        elif 'type' in node:
            known = part in EVERYWHERE or takes(node['type'], part)
        else:
            known = parts[i - 1] in FREE
        if not known:
            return f'{key}: {where} has no {part}'
        if i < len(parts) - 1:
            node = node.get(part, {}) if isinstance(node, dict) else {}
    return None


@contextmanager
def registries_restored():
    """Forget the classes that are registered meanwhile."""
    every = registries()
    before = [dict(r.module_dict) for r in every]
    try:
        yield
    finally:
        for registry, modules in zip(every, before, strict=True):
            registry.module_dict.clear()
            registry.module_dict.update(modules)
