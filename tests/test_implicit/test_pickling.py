import copy
import io
import pickle

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mdeq_mm.implicit import EquilibriumLayer
from tests.helpers import GRADIENTS, gradient_of, relative

EXACT = dict(type='BroydenSolver', max_steps=60, tol=1e-13)


class F(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = parametrizations.weight_norm(nn.Linear(4, 4))
        self.two = parametrizations.spectral_norm(nn.Linear(4, 4, bias=False))
        self.norm = nn.LayerNorm(4)

    def forward(self, maps, x):
        return [torch.tanh(0.4 * self.two(self.one(maps[0])) + 0.1 * self.norm(x))]


def make(name='implicit'):
    gradient, recompute = gradient_of(name, steps=40)
    torch.manual_seed(0)
    return EquilibriumLayer(F().double(), EXACT, gradient, recompute=recompute)


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = dict(
    pickle=lambda model: pickle.loads(pickle.dumps(model)),
    old=lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    torch=by_torch,
    deepcopy=copy.deepcopy,
)


@pytest.mark.parametrize('how', COPIES)
@pytest.mark.parametrize('name', GRADIENTS)
@pytest.mark.parametrize('stepped', [False, True])
def test_copies_compute_and_train_alike(how, name, stepped):
    layer = make(name)
    x = torch.randn(2, 4).double()
    start = [torch.zeros(2, 4).double()]
    layer.jacobian_probes, layer.jacobian_seed = 1, 0
    if stepped:
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        layer(start, x)[0].square().sum().backward()
        optimizer.step()
        # What is left behind is a loss with its graph.
        layer(start, x)
    other = COPIES[how](layer)
    assert other.state_dict().keys() == layer.state_dict().keys()
    grads = []
    for one in (layer, other, COPIES[how](other)):
        one.take_jacobian_loss()
        # Spectral norms of training mode change from pass to pass.
        one.f.two.eval()
        (out,) = one(start, x)
        loss = out.square().sum() + one.take_jacobian_loss()
        grads.append(torch.autograd.grad(loss, list(one.parameters())))
    assert relative(grads[1], grads[0]) < 1e-12
    assert relative(grads[2], grads[0]) < 1e-12
    kept = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert all(map(torch.equal, kept, layer.parameters()))


def test_what_is_shared_stays_shared():
    layer = make()
    model = nn.ModuleDict(dict(layer=layer, again=layer.f.one))
    model.weights = [layer.f.norm.weight]
    again = pickle.loads(pickle.dumps(model))
    assert again['again'] is again['layer'].f.one
    assert again.weights[0] is again['layer'].f.norm.weight


def test_parametrised_parts_are_what_they_were():
    one = pickle.loads(pickle.dumps(make())).f.one
    assert parametrize.is_parametrized(one, 'weight') and isinstance(one, nn.Linear)
    parametrize.remove_parametrizations(one, 'weight')
    assert type(one) is nn.Linear


def test_state_dicts_of_the_older_norm_still_load():
    one = pickle.loads(pickle.dumps(make())).f.one
    old = dict(weight_g=torch.ones(4, 1), weight_v=torch.eye(4), bias=torch.zeros(4))
    one.load_state_dict(old)
    assert torch.equal(one.weight, torch.eye(4).double())


def test_pruned():
    layer = make()
    prune.l1_unstructured(layer.f.norm, 'weight', amount=2)
    x, start = torch.randn(2, 4).double(), [torch.zeros(2, 4).double()]
    layer(start, x)[0].sum().backward()
    # PyTorch copies no pruned module: its weight is computed from another one.
    for how in ('pickle', 'old', 'torch'):
        other = COPIES[how](layer.eval())
        assert torch.equal(other(start, x)[0], layer(start, x)[0])


def run(rank, layer, x, out):
    out.copy_(layer([torch.zeros_like(x)], x)[0].detach())


def test_another_process():
    layer = make().eval()
    x = torch.randn(2, 4).double()
    out = torch.zeros_like(x).share_memory_()
    multiprocessing.spawn(run, (layer, x, out))
    assert relative(out, layer([torch.zeros_like(x)], x)[0]) < 1e-12
