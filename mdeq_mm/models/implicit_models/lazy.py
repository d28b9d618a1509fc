"""Subclasses of classes of a toolbox that may not be installed."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from ...tasks import PACKAGES


class LazySubclass:
    """Base of a class whose other base is imported when the first object is made.

    Importing the package imports neither toolbox, and each is optional.

    Attributes:
        _parent (str): The other base, with its module.
    """

    _parent = None

    def __new__(cls, *args, **kwargs):
        if LazySubclass in cls.__mro__ and not getattr(cls, '_complete', False):
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
    fields = dict(_complete=True, __module__=cls.__module__, __doc__=cls.__doc__)
    return type(cls.__name__, (cls, base), fields)
