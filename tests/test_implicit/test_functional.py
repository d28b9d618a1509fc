import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from mdeq_mm.implicit import FunctionalModule
from mdeq_mm.implicit.functional import frozen
from tests.helpers import project_classifier


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(2, 2, 3, padding=1))
        self.norm = nn.GroupNorm(1, 2)
        self.register_buffer('scale', torch.tensor(0.5))
        self.register_buffer('shift', torch.tensor(0.1), persistent=False)

    def forward(self, x, y):
        return self.scale * self.norm(self.conv(x)) + y + self.shift


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x, y):
        return self.conv(x) + y


@pytest.fixture
def net():
    return Net().double()


@pytest.fixture
def data():
    return torch.randn(2, 2, 5, 4).double(), torch.randn(2, 2, 5, 4).double()


def test_computes_what_the_module_computes(net, data):
    function = FunctionalModule(net)
    assert torch.equal(function(function.tensors, *data), net(*data))


def test_names_are_of_evaluated_tensors(net):
    function = FunctionalModule(net)
    assert set(function.names) == {
        'conv.weight',
        'conv.bias',
        'norm.weight',
        'norm.bias',
        'scale',
        'shift',
    }
    tensors = dict(zip(function.names, function.tensors, strict=True))
    assert torch.equal(tensors['conv.weight'], net.conv.weight)


def test_gradients_reach_what_weights_are_made_of(net, data):
    function = FunctionalModule(net)
    function(function.tensors, *data).square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net(*data).square().sum().backward()
    assert any('original0' in name for name in found)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_the_module_stays_as_it_was(net, data):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kinds = [type(m) for m in net.modules()]
    function = FunctionalModule(net)
    function(function.tensors, *data)
    assert parametrize.is_parametrized(net.conv, 'weight')
    assert [type(m) for m in net.modules()] == kinds
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_other_parametrisations_and_tied_weights(data):
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).double()
    net[1].weight = net[0].weight
    function = FunctionalModule(net)
    x = data[0]
    assert torch.equal(function(function.tensors, x), net(x))
    function(function.tensors, x).sum().backward()
    found = net[0].weight.grad.clone()
    net.zero_grad()
    net(x).sum().backward()
    torch.testing.assert_close(found, net[0].weight.grad)

    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    parametrize.register_parametrization(net[0], 'weight', Doubled())
    parametrize.register_parametrization(net[0], 'weight', Doubled())
    function = FunctionalModule(net)
    x = torch.randn(4, 3).double()
    assert torch.equal(function(function.tensors, x), net(x))


def test_keeps_nothing_of_an_evaluation(net, data):
    """What autograd keeps is seen by hooks of saved tensors; nothing hides here."""
    function = FunctionalModule(net)
    tensors = [t.detach().clone() for t in function.tensors]
    refs = [weakref.ref(t) for t in tensors]
    function(tensors, *data)
    del tensors
    assert not any(ref() is not None for ref in refs)

    class Fails(nn.Linear):
        def forward(self, x):
            raise KeyError(x)

    function = FunctionalModule(Fails(2, 2))
    tensors = [t.detach().clone() for t in function.tensors]
    refs = [weakref.ref(t) for t in tensors]
    with pytest.raises(KeyError):
        function(tensors, None)
    del tensors
    assert not any(ref() is not None for ref in refs)


def test_is_of_the_module_as_it_is(net, data):
    function = FunctionalModule(net)
    with torch.no_grad():
        net.conv.parametrizations.weight.original0.mul_(3)
    assert not torch.equal(function(function.tensors, *data), net(*data))
    function = FunctionalModule(net)
    assert torch.equal(function(function.tensors, *data), net(*data))
    net.float()
    data = [d.float() for d in data]
    function = FunctionalModule(net)
    assert torch.equal(function(function.tensors, *data), net(*data))


def test_tensors_that_are_plain_attributes(data):
    """Such as a scale that another network gives: gradients reach that one."""
    net = PlainNet().double()
    inner = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    net.conv.register_forward_pre_hook(
        lambda module, inputs: (module.scale * inputs[0],)
    )
    net.conv.scale = inner.square()
    function = FunctionalModule(net)
    found = function(function.tensors, *data)
    torch.testing.assert_close(found, net(*data))
    (mine,) = torch.autograd.grad(found.square().sum(), inner, retain_graph=True)
    (expected,) = torch.autograd.grad(net(*data).square().sum(), inner)
    torch.testing.assert_close(mine, expected)


def test_threads(net, data):
    """Each has its own, and all are of one module."""

    def work(scale):
        function = FunctionalModule(net)
        tensors = [scale * t.detach() for t in function.tensors]
        return [function(tensors, *data) for _ in range(20)]

    scales = [0.5, 1, 2, 4]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, scales))
    for scale, outs in zip(scales, found, strict=True):
        function = FunctionalModule(net)
        expected = function([scale * t.detach() for t in function.tensors], *data)
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize('data_type', [torch.float64, torch.float32])
def test_a_frozen_copy(net, data, data_type):
    prune.l1_unstructured(net.norm, 'weight', amount=1)
    copy = frozen(net)
    assert type(copy) is Net
    assert not any(p.requires_grad for p in copy.parameters())
    assert not any('parametrizations' in name for name in copy.state_dict())
    copy, net = copy.to(data_type), net.to(data_type)
    data = [d.to(data_type) for d in data]
    torch.testing.assert_close(copy(*data), net(*data), rtol=1e-6, atol=1e-6)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    'part',
    [
        nn.BatchNorm2d(2),
        nn.SyncBatchNorm(2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.RReLU(),
    ],
    ids=lambda p: str(p),
)
def test_parts_that_change_from_call_to_call_are_refused(part):
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(part))
    with pytest.raises(ValueError, match=type(part).__name__) as error:
        FunctionalModule(net)
    assert '1.0' in str(error.value)
    assert 'group norm' in str(error.value)


@pytest.mark.parametrize(
    'part',
    [
        nn.BatchNorm2d(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.Dropout(0.1),
    ],
    ids=str,
)
def test_in_evaluation_they_are_fixed(part):
    """As the dropout of an adapter is."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1), part).double().eval()
    x = torch.randn(2, 2, 3, 3).double()
    function = FunctionalModule(net)
    assert torch.equal(function(function.tensors, x), net(x))
    with pytest.raises(ValueError, match=type(part).__name__):
        FunctionalModule(net.train())


def test_a_solve_leaves_f_unchanged():
    backbone = project_classifier().backbone.train()
    f = backbone.equilibrium.f
    before = {k: v.clone() for k, v in f.state_dict().items()}
    versions = [p._version for p in f.parameters()]
    backbone(torch.randn(2, 3, 14, 11).double())[0].sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert [p._version for p in f.parameters()] == versions
    assert not any(p.is_meta for p in f.parameters())
