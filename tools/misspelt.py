"""Settings of a config that no class knows: which, and what may have been meant."""

import difflib
import inspect
import re
from collections.abc import Iterator

import mmengine.registry
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner

UNEXPECTED = re.compile(
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
)


def unknown_setting(error: BaseException, cfg: Config) -> str | None:
    """Say which setting of a config a class does not know.

    Args:
        error (BaseException): What a registry or a class raised.
        cfg (Config): What was being built.

    Returns:
        str | None: A sentence with the setting, its value and what may have been
        meant; None if the error is another one, or the config has no such key.
    """
    complaint = UNEXPECTED.search(str(error))
    if complaint is None:
        return None
    name, key = complaint.groups()
    # The same key may be right elsewhere.
    found = [
        (path, value, owner or name)
        for path, value, owner in _settings(cfg.to_dict(), key)
        if key not in _keywords(owner or name)
    ]
    if not found:
        return None
    # A base of the class in the config may have complained, if it is known to be one.
    path, value, owner = max(found, key=lambda setting: name in _bases(setting[2]))
    return _sentence(path, value, owner, _keywords(owner) or _keywords(name))


def unknown_in_checkpoint_hook(runner: Runner) -> str | None:
    """Say which setting of a CheckpointHook nobody knows.

    It passes on what it does not know, which fails when the first checkpoint is
    written.

    Args:
        runner (Runner): Built, and not yet training.

    Returns:
        str | None: As of :func:`unknown_setting`.
    """
    passed_on = inspect.signature(runner.save_checkpoint).parameters
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            name = type(hook).__name__
            for key in hook.args.keys() - passed_on.keys():
                known = [*_keywords(name), *passed_on]
                for path, value, owner in _settings(runner.cfg.to_dict(), key):
                    if owner == name:
                        return _sentence(path, value, owner, known)
    return None


def _sentence(path: str, value: object, owner: str, known: list[str]) -> str:
    """What is wrong with a setting, and what may have been meant."""
    key = path.rpartition('.')[2]
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        hint = f'did you mean {close[0]!r}?'
    elif known:
        hint = f'use one of {", ".join(known)}.'
    else:
        hint = 'leave it out, or correct its name.'
    return f'{path}={value!r}: {owner} has no setting {key!r}; {hint}'


def _settings(node: object, key: str, path: str = '') -> Iterator[tuple]:
    """Where a key stands: its path, its value, and the type of what has it."""
    if isinstance(node, dict):
        if key in node:
            owner = node.get('type')
            if inspect.isclass(owner):
                owner = owner.__name__
            yield f'{path}{key}', node[key], owner
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    else:
        return
    for name, part in items:
        yield from _settings(part, key, f'{path}{name}.')


def _keywords(name: str) -> list[str]:
    """Keyword arguments of the class of a name, with those it may inherit."""
    cls = _find_class(name)
    if cls is None:
        return []
    makers = [base.__init__ for base in cls.__mro__[:-1] if '__init__' in vars(base)]
    # In their order, each once.
    return list(
        dict.fromkeys(
            parameter.name
            for make in makers
            for parameter in list(inspect.signature(make).parameters.values())[1:]
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        )
    )


def _bases(name: str) -> list[str]:
    """Names of the class of a name and of its bases."""
    cls = _find_class(name)
    return [name] if cls is None else [base.__name__ for base in cls.__mro__]


def _find_class(name: str) -> type | None:
    """The class of a name, of whatever registry, or a data loader."""
    scope = DefaultScope.get_current_instance()
    names = [name] if scope is None else [f'{scope.scope_name}.{name}', name]
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, Registry):
            for cls in map(registry.get, names):
                if inspect.isclass(cls):
                    return cls
    # What mmengine builds without a registry.
    return getattr(torch.utils.data, name, None)
