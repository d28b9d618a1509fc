import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from mdeq_mm.implicit import FunctionalModule
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
    assert torch.equal(function(function.tensors(net), *data), net(*data))


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
    tensors = dict(zip(function.names, function.tensors(net), strict=True))
    assert torch.equal(tensors['conv.weight'], net.conv.weight)


def test_gradients_reach_what_weights_are_made_of(net, data):
    function = FunctionalModule(net)
    function(function.tensors(net), *data).square().sum().backward()
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
    function(function.tensors(net), *data)
    assert parametrize.is_parametrized(net.conv, 'weight')
    assert [type(m) for m in net.modules()] == kinds
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_other_parametrisations_and_tied_weights(data):
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).double()
    net[1].weight = net[0].weight
    function = FunctionalModule(net)
    x = data[0]
    assert torch.equal(function(function.tensors(net), x), net(x))
    function(function.tensors(net), x).sum().backward()
    found = net[0].weight.grad.clone()
    net.zero_grad()
    net(x).sum().backward()
    torch.testing.assert_close(found, net[0].weight.grad)

    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    parametrize.register_parametrization(net[0], 'weight', Doubled())
    parametrize.register_parametrization(net[0], 'weight', Doubled())
    function = FunctionalModule(net)
    x = torch.randn(4, 3).double()
    assert torch.equal(function(function.tensors(net), x), net(x))


def test_holds_no_memory_of_its_own(net):
    gc.collect()
    function = FunctionalModule(net)
    skeleton = function._skeleton
    held = [*skeleton.parameters(), *skeleton.buffers()]
    assert held
    assert all(t.is_meta for t in held)


def test_follows_a_module_that_changed(net, data):
    function = FunctionalModule(net)
    with torch.no_grad():
        net.conv.parametrizations.weight.original0.mul_(3)
    assert torch.equal(function(function.tensors(net), *data), net(*data))
    net.float()
    data = [d.float() for d in data]
    assert torch.equal(function(function.tensors(net), *data), net(*data))


def test_serves_a_copy_of_the_module(net, data):
    function = FunctionalModule(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv.parametrizations.weight.original1.add_(1)
    assert torch.equal(function(function.tensors(other), *data), other(*data))
    again = copy.deepcopy(function)
    assert torch.equal(again(again.tensors(net), *data), net(*data))


def test_pickles(data):
    # PyTorch pickles no parametrised module, so this one is plain.
    net = PlainNet().double()
    function = FunctionalModule(net)
    again = pickle.loads(pickle.dumps(function))
    assert torch.equal(again(again.tensors(net), *data), net(*data))


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


def test_a_solve_leaves_f_unchanged():
    backbone = project_classifier().backbone.train()
    f = backbone.equilibrium.f
    before = {k: v.clone() for k, v in f.state_dict().items()}
    versions = [p._version for p in f.parameters()]
    backbone(torch.randn(2, 3, 14, 11).double())[0].sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())
    assert [p._version for p in f.parameters()] == versions
    assert not any(p.is_meta for p in f.parameters())
