import pytest
import torch
from torch import nn

from mdeq_mm.analysis.saved_bytes import saved_bytes
from mdeq_mm.models.layers.recompute import recompute


def network(dropout=0.3):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, momentum=0.2),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
    ).double()


def step(run, net, x):
    torch.manual_seed(3)
    out = run(net, x)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters()] + [x.grad.clone()]
    return out.detach(), grads, {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize('frozen', [False, True])
def test_same_gradients_and_statistics_as_without(frozen):
    plain, again = network(), network()
    again.load_state_dict(plain.state_dict())
    for net in (plain, again):
        net[1].train(not frozen)
    x = torch.randn(4, 3, 9, 8).double()
    expected = step(lambda net, x: net(x), plain, x.clone().requires_grad_())
    found = step(lambda net, x: recompute(net, net, x), again, x.requires_grad_())
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for name, value in expected[2].items():
        assert torch.equal(found[2][name], value), name
    assert found[2]['5.num_batches_tracked'] == 1


def test_under_autocast():
    plain, again = network(0).float(), network(0).float()
    again.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 9, 8)

    def cast(run):
        with torch.autocast('cpu', torch.bfloat16):
            return run().float()

    expected = step(
        lambda net, x: cast(lambda: net(x)), plain, x.clone().requires_grad_()
    )
    found = step(
        lambda net, x: cast(lambda: recompute(net, net, x)), again, x.requires_grad_()
    )
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_keeps_its_inputs_alone():
    net = network()
    x = torch.randn(4, 3, 20, 20).double().requires_grad_()
    kept = saved_bytes(lambda: recompute(net, net, x))
    assert kept == x.nbytes
    assert saved_bytes(lambda: net(x)) > 5 * kept
