"""Views of modules: copies that share everything with them but their tensors."""

import functools
import types
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

#: Hooks of PyTorch that make a weight from other tensors before each call. (The
#: functions that register them hide the modules of the same names.)
_WEIGHT_HOOKS = (
    prune.BasePruningMethod,
    spectral_norm.__globals__['SpectralNorm'],
    weight_norm.__globals__['WeightNorm'],
)

_OUTPUT_HOOKS = ('_forward_hooks', '_backward_hooks', '_backward_pre_hooks')

#: Attributes of every module.
_COMMON = frozenset(vars(nn.Module()))


def view_of(module):
    """A view of a module and its parts.

    A forward pass of the view is one of the module: of its class or with the
    ``forward`` it was given, with its hooks, and with whatever parts it has now.
    Tensors that are made from parameters (by parametrisations, pruning, and norms
    that are hooks) are made here, once, and stand in the view as plain ones.

    Forward and backward hooks are given the module that they were registered on;
    forward pre-hooks the view, because they may set what it computes with.
    Attributes that a forward pass sets are set in the view; :func:`hand_back` sets them
    in the module.

    Args:
        module (nn.Module): The module; stays as it is.

    Returns:
        tuple[nn.Module, dict]: The view, and the views of the module and its parts.
    """
    views = {}
    view = _copied(module, views)
    seen = dict(views)
    for original, copy in views.items():
        state = vars(copy)
        for name in state.keys() - _COMMON:
            state[name] = _rebound(state[name], seen)
        for kind in _OUTPUT_HOOKS:
            if state[kind]:
                state[kind] = OrderedDict(
                    (key, functools.partial(_call, hook, original))
                    for key, hook in state[kind].items()
                )
        if state['_forward_pre_hooks']:
            _make_weights(copy)
    return view, views


def attributes_of(views):
    """What the parts of a module have that not every module has.

    Args:
        views (dict[nn.Module, nn.Module]): Of :func:`view_of`.

    Returns:
        list[tuple]: For :func:`hand_back`.
    """
    return [
        (part, view, {k: v for k, v in vars(view).items() if k not in _COMMON})
        for part, view in views.items()
    ]


def hand_back(before):
    """Set in a module what forward passes have set in its view.

    Args:
        before (list[tuple]): Of :func:`attributes_of`, from before those passes.
    """
    for part, view, old in before:
        for name, value in vars(view).items():
            if name in _COMMON or isinstance(value, nn.Module):
                continue
            if name not in old or old[name] is not value:
                # Without its graph, which no later forward pass is part of.
                value = value.detach() if isinstance(value, Tensor) else value
                vars(part)[name] = value


def _copied(module, views):
    """A copy of a module whose parts are copies, with parametrised tensors plain."""
    if module in views:
        return views[module]
    cls = parametrize.type_before_parametrizations(module)
    # Of a class whose own __new__ makes others, such as torch.fx.GraphModule, too.
    view = views[module] = object.__new__(cls)
    state = vars(view)
    state.update(vars(module))
    parameters, parts = dict(module._parameters), dict(module._modules)
    if cls is not type(module):
        for name in parts.pop('parametrizations'):
            parameters[name] = getattr(module, name)
    state['_parameters'], state['_buffers'] = parameters, dict(module._buffers)
    state['_modules'] = {
        name: None if part is None else _copied(part, views)
        for name, part in parts.items()
    }
    return view


def _call(hook, module, view, *args):
    return hook(module, *args)


def _make_weights(view):
    hooks = view._forward_pre_hooks
    vars(view)['_forward_pre_hooks'] = OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if not isinstance(hook, _WEIGHT_HOOKS)
    )
    for hook in hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(view, ())


def _rebound(value, seen):
    """A value with views in the place of the modules that it refers to.

    A ``forward`` that was set on an object is bound to it, or closes over it.

    Args:
        value: Any.
        seen (dict): Modules and identities of other values, and what is in their
            places.
    """
    if isinstance(value, nn.Module):
        return seen.get(value, value)
    split = _SPLIT.get(type(value))
    if split is None:
        return value
    if id(value) not in seen:
        # Where it refers to itself.
        seen[id(value)] = value
        parts, join = split(value)
        new = [_rebound(part, seen) for part in parts]
        if any(a is not b for a, b in zip(new, parts, strict=True)):
            seen[id(value)] = join(*new)
    return seen[id(value)]


def _split_method(value):
    return (value.__func__, value.__self__), types.MethodType


def _split_partial(value):
    def join(function, args, keywords):
        return functools.partial(function, *args, **keywords)

    return (value.func, value.args, value.keywords), join


def _split_function(value):
    def join(defaults, keyword_defaults, *contents):
        new = types.FunctionType(
            value.__code__,
            value.__globals__,
            value.__name__,
            defaults,
            tuple(map(types.CellType, contents)),
        )
        new.__kwdefaults__ = keyword_defaults
        return functools.update_wrapper(new, value)

    contents = [_content(cell) for cell in value.__closure__ or ()]
    return (value.__defaults__, value.__kwdefaults__, *contents), join


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:
        # It is not set yet.
        return None


def _split_sequence(value):
    return value, lambda *parts: type(value)(parts)


def _split_dict(value):
    return list(value.values()), lambda *parts: type(value)(
        zip(value, parts, strict=True)
    )


#: From a value to its parts and to what makes one of others, by type.
_SPLIT = {
    types.MethodType: _split_method,
    types.FunctionType: _split_function,
    functools.partial: _split_partial,
    list: _split_sequence,
    tuple: _split_sequence,
    dict: _split_dict,
    OrderedDict: _split_dict,
}
