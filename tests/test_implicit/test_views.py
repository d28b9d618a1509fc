import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from mdeq_mm.implicit.views import view_of


class Aliased(nn.Module):
    """A module that reaches its parts by other ways than their names."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.order = [self.two, self.one]
        self.by_name = dict(first=self.two, then=(self.one, 'one'))
        self.run = self.one.forward
        self.__dict__['hidden'] = self.two

    def forward(self, x):
        x = self.order[0](x)
        x = self.by_name['then'][0](x)
        return self.run(self.hidden(x))


def tensors_in(view):
    return [t for part in view.modules() for t in part._parameters.values()]


def zeroed(view):
    """What a view computes with zeros for parameters: it reads no others."""
    for part in view.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = None if value is None else torch.zeros_like(value)
    return view


def test_shares_everything_but_its_tensors():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    view, _ = view_of(net)
    assert type(view) is nn.Sequential and type(view[0]) is nn.Linear
    assert view[0] is not net[0]
    assert view[0].weight is net[0].weight
    view[0]._parameters['weight'] = None
    assert net[0].weight is not None


def test_parts_that_are_used_twice():
    part = nn.Linear(2, 2)
    view, _ = view_of(nn.ModuleList([part, nn.Sequential(part), None]))
    assert view[0] is view[1][0] and view[2] is None


def test_other_references_to_parts():
    net = Aliased()
    assert net(torch.ones(1, 2)).abs().sum() > 0
    assert zeroed(view_of(net)[0])(torch.ones(1, 2)).eq(0).all()
    assert net(torch.ones(1, 2)).abs().sum() > 0


def _scaled(layer, x, factor=2):
    return factor * nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize(
    'make',
    [
        lambda layer: types.MethodType(_scaled, layer),
        lambda layer: functools.partial(_scaled, layer, factor=3),
        lambda layer: lambda x, old=layer.forward: 2 * old(x),
        lambda layer: lambda x, *, old=layer: _scaled(old, x),
        lambda layer: functools.wraps(layer.forward)(lambda x: _scaled(layer, x)),
    ],
)
def test_functions_that_were_set_on_a_module(make):
    layer = nn.Linear(2, 2)
    layer.forward = make(layer)
    x = torch.ones(1, 2)
    assert torch.equal(view_of(layer)[0](x), layer(x))
    assert zeroed(view_of(layer)[0])(x).eq(0).all()


def test_a_function_that_refers_to_itself():
    layer = nn.Linear(2, 2)

    def forward(x, depth=2):
        return forward(x, depth - 1) if depth else layer.weight.sum() * x

    layer.forward = forward
    assert torch.equal(view_of(layer)[0](torch.ones(2)), layer(torch.ones(2)))


@pytest.mark.parametrize('normalise', [parametrizations.weight_norm, weight_norm])
def test_weights_that_are_made(normalise):
    layer = normalise(nn.Linear(3, 3))
    view, _ = view_of(layer)
    assert type(view) is nn.Linear
    assert not view._forward_pre_hooks
    assert torch.equal(view.weight, layer.weight)
    view(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_pruning_leaves_other_hooks():
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, 'weight', amount=0.5)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    x = torch.randn(2, 3)
    view, _ = view_of(layer)
    assert torch.equal(view(x), layer(x))
    assert len(view._forward_pre_hooks) == 1 and len(layer._forward_pre_hooks) == 2


def test_a_pre_hook_that_makes_a_weight():
    """As an equalised learning rate does it."""
    layer = nn.Linear(3, 3, bias=False)
    layer.weight_orig = nn.Parameter(layer._parameters.pop('weight').data)
    layer.weight = layer.weight_orig.data

    def equalise(module, inputs):
        module.weight = module.weight_orig * 3

    layer.register_forward_pre_hook(equalise)
    x = torch.randn(2, 3)
    view_of(layer)[0](x).sum().backward()
    torch.testing.assert_close(layer.weight_orig.grad, 3 * x.sum(0).expand(3, 3))


def test_hooks_are_given_the_module_they_were_set_on():
    layer = nn.Linear(2, 2)
    seen = []
    layer.register_forward_hook(lambda module, i, o: seen.append(module))
    layer.register_forward_hook(
        lambda module, i, kwargs, o: seen.append(module), with_kwargs=True
    )
    layer.register_full_backward_hook(lambda module, i, o: seen.append(module))
    layer.register_full_backward_pre_hook(lambda module, o: seen.append(module))
    x = torch.ones(1, 2, requires_grad=True)
    view_of(layer)[0](x).sum().backward()
    assert len(seen) == 4 and all(module is layer for module in seen)


@pytest.mark.parametrize('how', ['torch.compile', 'compile'])
def test_compiled_modules(how):
    """They are compiled once, whatever number of views runs."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh())
    x = torch.randn(2, 3)
    expected = net(x)
    if how == 'compile':
        net.compile(backend=backend)
    else:
        net = torch.compile(net, backend=backend)
    for _ in range(4):
        net.zero_grad()
        out = view_of(net)[0](x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    assert len(graphs) == 1
