"""Pickling of parametrised modules, which PyTorch leaves to state dicts."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize


def let_pickle(module):
    """Make a module's parametrised parts picklable, such as normalised convolutions.

    Their classes are made at run time, one for each, and refuse. Here they say how to
    be made again.

    Args:
        module (nn.Module): The module.
    """
    for part in module.modules():
        if parametrize.is_parametrized(part):
            type(part).__reduce_ex__ = _reduce


def _reduce(module, protocol):
    state = {k: v for k, v in vars(module).items() if k != '_compiled_call_impl'}
    hooks = state['_load_state_dict_pre_hooks']
    state['_load_state_dict_pre_hooks'] = OrderedDict(
        (key, _OldNames.of(hook) or hook) for key, hook in hooks.items()
    )
    cls = parametrize.type_before_parametrizations(module)
    return _parametrised, (cls, tuple(module.parametrizations)), state


def _parametrised(cls, names):
    """A module of a class made for parametrised tensors of these names, empty yet."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    let_pickle(module)
    return module


class _OldNames:
    """Pickles as the hook by which a normalised weight loads its old names.

    Args:
        name (str): Of the weight.
    """

    def __init__(self, name):
        self.name = name

    @classmethod
    def of(cls, hook):
        """In place of a hook that is one of these; None for others."""
        function = getattr(hook, 'hook', hook)
        kind = getattr(function, '__qualname__', '')
        if kind != 'weight_norm.<locals>._weight_norm_compat_hook':
            return None
        return cls(function.__closure__[0].cell_contents)

    def __reduce__(self):
        return _old_names, (self.name,)


def _old_names(name):
    """The hook of a module that was normalised to get it."""
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.ones(1, 1)))
    parametrizations.weight_norm(module, name)
    return next(iter(module._load_state_dict_pre_hooks.values()))
