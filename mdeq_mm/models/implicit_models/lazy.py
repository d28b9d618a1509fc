"""Subclasses of classes of a toolbox that may not be installed."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from ...tasks import PACKAGES


class _Complete:
    """The class with both bases as an attribute of the written one.

    Pickles look up classes by their qualified names, in processes where no object
    was made yet.
    """

    def __get__(self, instance, cls):
        return cls if cls._complete else _completed(cls)


class LazySubclass:
    """Base of a class whose other base is imported when the first object is made.

    Importing the package imports neither toolbox, and each is optional.

    Attributes:
        _parent (str): The other base, with its module.
    """

    _parent = None

    _complete = False
    _complete_class = _Complete()

    def __new__(cls, *args, **kwargs):
        if not cls._complete:
            cls = _completed(cls)
        return super().__new__(cls)


@cache
def _completed(cls):
    module, _, name = cls._parent.rpartition('.')
    toolbox = module.partition('.')[0]
    if find_spec(toolbox) is None:
        raise ImportError(
            f'{cls.__name__} extends a class of {toolbox}, which is not '
            f'installed: run "pip install {PACKAGES[toolbox].split(" ")[0]}" (docs/'
            'installation.md has the sets of packages and their versions)'
        )
    base = getattr(import_module(module), name)
    fields = dict(
        _complete=True,
        __module__=cls.__module__,
        __qualname__=f'{cls.__qualname__}._complete_class',
        __doc__=cls.__doc__,
    )
    return type(cls.__name__, (cls, base), fields)
