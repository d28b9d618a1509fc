"""What users do to the modules of any backbone, done to f."""

import functools
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from tests.helpers import gradient_of, project_classifier, project_golden, relative


@pytest.fixture
def backbone():
    """Contractive, with normalised weights, in float64; it solves exactly."""
    return project_classifier(norm_eval=True).backbone.train()


@pytest.fixture
def images():
    return project_golden()['input'][:2].double()


def settled(backbone, images, steps=50):
    """The maps by plain iteration of f itself, recorded as a whole."""
    injection = backbone.injection(backbone.stem(images))
    maps = backbone._start(injection)
    for _ in range(steps):
        maps = backbone.equilibrium.f(maps, injection)
    return maps


def gradients(maps, parameters):
    loss = sum((m * torch.linspace(-1, 1, m.numel()).view_as(m)).sum() for m in maps)
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def assert_follows(backbone, images, parameters=None):
    """Outputs and gradients are those of f as it is now."""
    parameters = parameters or list(backbone.parameters())
    maps = settled(backbone, images)
    expected = gradients(maps, parameters)
    layer = backbone.equilibrium
    names = ['implicit', 'implicit, recomputed', 'unrolled, recomputed']
    # In evaluation, what iterates is replaced by the implicit gradient's defaults.
    for name in names if backbone.training else names[:2]:
        layer.gradient, layer.recompute = gradient_of(name, steps=50)
        found = backbone(images)
        assert relative(found, maps) < 1e-10
        assert relative(gradients(found, parameters), expected) < 1e-9


class Adapter(nn.Module):
    """A low-rank adapter around a convolution of 1x1 pixels (Hu et al. 2022)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Conv2d(inner.in_channels, 1, 1, bias=False)
        self.up = nn.Conv2d(1, inner.out_channels, 1, bias=False)

    def forward(self, x):
        return self.inner(x) + 0.1 * self.up(self.down(x))


def adapted(backbone):
    f = backbone.equilibrium.f
    f.post_convs[0] = Adapter(f.post_convs[0]).double()
    return f.post_convs[0]


def test_a_layer_that_was_replaced(backbone, images):
    f = backbone.equilibrium.f
    before = backbone(images)
    f.post_norms[0] = nn.Sequential(f.post_norms[0], nn.Tanh())
    assert relative(backbone(images), before) > 1e-2
    assert_follows(backbone, images)


def test_adapters_take_effect_and_train(backbone, images):
    before = backbone(images)
    backbone.requires_grad_(False)
    adapter = adapted(backbone)
    parameters = [adapter.down.weight, adapter.up.weight]
    assert relative(backbone(images), before) > 1e-4
    assert_follows(backbone, images, parameters)


@pytest.mark.parametrize('how', ['method', 'partial', 'closure', 'default'])
def test_a_forward_that_was_set_on_a_layer(backbone, images, how):
    """As by functions that adapt a layer in place; weights are still trained."""
    conv = backbone.equilibrium.f.post_convs[0]
    old = conv.forward

    def scaled(layer, x):
        return 0.9 * conv2d(x, layer.weight)

    conv.forward = dict(
        method=types.MethodType(scaled, conv),
        partial=functools.partial(scaled, conv),
        closure=lambda x: 0.9 * old(x),
        default=lambda x, layer=conv: scaled(layer, x),
    )[how]
    assert_follows(backbone, images)


@pytest.mark.parametrize('how', ['hook', 'pre-hook', 'forward', 'script'])
def test_adapters_that_are_no_part_of_f(backbone, images, how):
    """As toolkits attach them: the weights lie outside, and train."""
    conv = backbone.equilibrium.f.fusion.paths[0]['1'].conv
    down = nn.Conv2d(conv.in_channels, 2, 1, bias=False).double()
    up = nn.Conv2d(2, conv.out_channels, 1, bias=False).double()
    before, old = backbone(images), conv.forward
    if how == 'hook':
        conv.register_forward_hook(lambda m, i, out: out + 0.1 * up(down(i[0])))
    elif how == 'pre-hook':
        up = nn.Conv2d(2, conv.in_channels, 1, bias=False).double()
        conv.register_forward_pre_hook(lambda m, i: (i[0] + 0.1 * up(down(i[0])),))
    elif how == 'forward':
        conv.forward = lambda x: old(x) + 0.1 * up(down(x))
    else:
        norm = backbone.equilibrium.f.post_norms[0]
        backbone.equilibrium.f.post_norms[0] = torch.jit.script(norm)
        down = up = norm
    if how != 'script':
        assert relative(backbone(images), before) > 1e-4
    assert_follows(backbone, images, [down.weight, up.weight, conv.weight])


def test_a_part_that_was_traced(backbone, images):
    f = backbone.equilibrium.f
    f.post_norms[0] = torch.fx.symbolic_trace(f.post_norms[0])
    assert_follows(backbone, images)


class Recorder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.seen = inner, 0, None

    def forward(self, x):
        self.calls += 1
        self.seen = self.inner(x)
        return self.seen


@pytest.mark.parametrize('training', [True, False])
def test_what_a_layer_keeps_on_itself(backbone, images, training):
    """Attention maps, for one: the last of a forward pass, without its graph."""
    backbone.train(training)
    parameters = list(backbone.parameters())
    expected = gradients(backbone(images), parameters)
    f = backbone.equilibrium.f
    f.post_norms[0] = layer = Recorder(f.post_norms[0])
    calls = 0
    for _ in range(2):
        found = gradients(backbone(images), parameters)
        assert relative(found, expected) < 1e-12
        assert layer.calls - calls >= backbone.last_solution.steps.max()
        assert layer.seen.grad_fn is None
        state = layer.seen.flatten(1)
        value = backbone.last_solution.value[:, : state.shape[1]]
        assert relative(state, value) < 1e-6
        calls = layer.calls


def test_f_alone_is_pickled(backbone):
    f = backbone.equilibrium.f
    twin = pickle.loads(pickle.dumps(f))
    assert all(map(torch.equal, f.parameters(), twin.parameters()))


class TestHooks:
    def test_fire_once_an_evaluation(self, backbone, images):
        f = backbone.equilibrium.f
        seen, before = [], []
        f.fusion.register_forward_hook(lambda *call: seen.append(call[0]))
        f.fusion.register_forward_pre_hook(lambda *call: before.append(call[0]))
        backbone.eval()
        with torch.no_grad():
            backbone(images)
        assert len(seen) == len(before) == backbone.last_solution.steps.max()
        # Many keep what they see by module.
        assert all(module is f.fusion for module in seen)

    def test_change_what_they_return(self, backbone, images):
        f = backbone.equilibrium.f
        handle = f.post_norms[0].register_forward_hook(lambda m, i, out: 0.8 * out)
        assert_follows(backbone, images)
        changed = backbone(images)
        handle.remove()
        assert relative(backbone(images), changed) > 1e-2
        assert_follows(backbone, images)

    @pytest.mark.parametrize('training', [True, False])
    def test_activations_and_gradients_inside(self, backbone, images, training):
        """Grad-CAM: what a layer returns at the equilibrium, and the gradient there."""
        conv = backbone.train(training).equilibrium.f.post_convs[0]
        values, grads = [], []

        def keep(module, inputs, out):
            values.append(out.detach())
            if out.requires_grad:
                out.register_hook(grads.append)

        conv.register_forward_hook(keep)
        gradients(backbone(images), [conv.parametrizations.weight.original1])
        found = values[-1], grads[-1]
        # The last step of a long iteration, with all that follows from it before.
        backbone.equilibrium.unroll_steps = 50
        gradients(backbone(images), [conv.parametrizations.weight.original1])
        assert relative(found[0], values[-1]) < 1e-10
        assert relative(found[1], sum(grads[-50:])) < 1e-9

    def test_of_backward_passes(self, backbone, images):
        conv = backbone.equilibrium.f.post_convs[0]
        seen = []
        conv.register_full_backward_hook(lambda module, i, o: seen.append(module))
        gradients(backbone(images), list(backbone.parameters()))
        assert seen
        assert all(module is conv for module in seen)


class TestWeightsThatAreMade:
    def test_pruning(self, backbone, images):
        conv = backbone.equilibrium.f.fusion.paths[0]['1'].conv
        before = backbone(images)
        prune.random_unstructured(conv, 'weight', amount=0.5)
        assert relative(backbone(images), before) > 1e-4
        assert_follows(backbone, images)
        (grad,) = gradients(backbone(images), [conv.weight_orig])
        assert grad[conv.weight_mask == 0].eq(0).all()
        assert grad[conv.weight_mask == 1].ne(0).any()

    def test_pruning_of_a_normalised_weight(self, backbone, images):
        conv = backbone.equilibrium.f.post_convs[0]
        parametrize.register_parametrization(
            conv, 'weight', Masked(torch.ones_like(conv.weight).tril())
        )
        assert_follows(backbone, images)

    @pytest.mark.parametrize(
        'normalise', [parametrizations.spectral_norm, spectral_norm]
    )
    def test_spectral_norm(self, backbone, images, normalise):
        """Its power iteration takes a step a forward pass, not an evaluation."""
        conv = normalise(backbone.equilibrium.f.fusion.paths[0]['1'].conv)
        conv.double()
        buffer = next(b for name, b in conv.named_buffers() if name.endswith('_u'))
        vectors = [buffer.clone()]
        for _ in range(2):
            backbone(images)
            vectors.append(buffer.clone())
        assert not torch.equal(vectors[0], vectors[1])
        assert not torch.equal(vectors[1], vectors[2])
        weight = conv.weight_orig if hasattr(conv, 'weight_orig') else (
            conv.parametrizations.weight.original)  # fmt: skip
        matrix = weight.detach().flatten(1)
        u, v = vectors[0], None
        for expected in vectors[1:]:
            v = nn.functional.normalize(matrix.T @ u, dim=0)
            u = nn.functional.normalize(matrix @ v, dim=0)
            torch.testing.assert_close(u, expected)
        assert_follows(backbone.eval(), images)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer('mask', mask)

    def forward(self, weight):
        return weight * self.mask


def test_running_statistics_that_come_later_are_refused(backbone, images):
    f = backbone.equilibrium.f
    f.post_norms[0] = nn.BatchNorm2d(f.post_norms[0].num_channels).double()
    with pytest.raises(ValueError, match=r'post_norms.0=BatchNorm2d.*group norm'):
        backbone.equilibrium.train()(backbone._start(backbone.stem(images)),
                                     backbone.stem(images))  # fmt: skip
