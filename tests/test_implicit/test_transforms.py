"""torch.func and forward-mode differentiation of equilibria, and second derivatives."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.parametrizations import weight_norm

from mdeq_mm.implicit import AndersonSolver, EquilibriumLayer
from tests.helpers import GRADIENTS, gradient_of, project_classifier, relative

FIXED = {
    'picard': dict(type='PicardSolver', max_steps=60, tol=0),
    'damped': dict(type='PicardSolver', max_steps=90, tol=0, damping=0.8),
    'anderson': dict(type='AndersonSolver', max_steps=30, tol=0),
    'mixed': dict(type='AndersonSolver', max_steps=30, tol=0, memory=2, mixing=0.7),
}
EXACT = dict(type='BroydenSolver', max_steps=60, tol=1e-13)
IMPLICIT = dict(type='ImplicitGradient', solver=EXACT)


class F(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = weight_norm(nn.Linear(3, 3))
        with torch.no_grad():
            self.inner.parametrizations.weight.original0.mul_(0.5)

    def forward(self, maps, x):
        return [torch.tanh(self.inner(maps[0]) + x)]


@pytest.fixture
def x():
    return torch.randn(2, 3).double()


def make(solver, gradient=IMPLICIT, **options):
    return EquilibriumLayer(F().double(), solver, gradient, **options)


def call(layer, x):
    return layer([torch.zeros_like(x)], x)[0]


def plain(layer, x, steps=120):
    maps = [torch.zeros_like(x)]
    for _ in range(steps):
        maps = layer.f(maps, x)
    return maps[0]


def loss(z):
    return (z * torch.linspace(-1, 2, z.numel()).view_as(z).to(z)).sum()


@pytest.mark.parametrize('kind', FIXED)
class TestEvaluation:
    """Of a fixed iteration; the numbers of f iterated as it stands."""

    @pytest.fixture
    def layer(self, kind):
        return make(FIXED[kind]).eval()

    def test_where_the_start_is_the_equilibrium(self, layer, x):
        """No later iterate is better, and the start is made of no weight."""
        if isinstance(layer.eval_solver, AndersonSolver):
            pytest.skip('has no derivative where residuals are zero')
        z = plain(layer, x).detach()
        found = grad(lambda x: loss(layer([z], x)[0]))(x)
        assert relative(found, grad(lambda x: loss(plain(layer, x)))(x)) < 1e-8

    def test_a_sample_that_failed(self, layer, x):
        x[1] = torch.nan
        z = vmap(lambda x: call(layer, x[None])[0])(x)
        assert z[0].isfinite().all() and z[1].isnan().all()
        assert relative(z[0], call(layer, x)[0]) < 1e-12

    def test_grad_and_hessian(self, layer, x):
        for transform in (grad, hessian):
            found = transform(lambda x: loss(call(layer, x)))(x)
            expected = transform(lambda x: loss(plain(layer, x)))(x)
            assert relative(found, expected) < 1e-8

    def test_jacobians(self, layer, x):
        expected = torch.autograd.functional.jacobian(lambda x: plain(layer, x), x)
        for transform in (jacrev, jacfwd):
            assert relative(transform(lambda x: call(layer, x))(x), expected) < 1e-8

    def test_jvp(self, layer, x):
        tangent = torch.randn_like(x)
        out, found = jvp(lambda x: call(layer, x), (x,), (tangent,))
        expected = jvp(lambda x: plain(layer, x), (x,), (tangent,))
        assert relative(out, expected[0]) < 1e-10
        assert relative(found, expected[1]) < 1e-8
        with forward_ad.dual_level():
            out = call(layer, forward_ad.make_dual(x, tangent))
            found = forward_ad.unpack_dual(out).tangent
        assert relative(found, expected[1]) < 1e-8

    def test_vmap(self, layer, x):
        many = torch.randn(4, 2, 3).double()
        found = vmap(lambda x: call(layer, x))(many)
        expected = torch.stack([call(layer, x) for x in many])
        assert relative(found, expected.detach()) < 1e-10
        found = vmap(grad(lambda x: loss(call(layer, x))))(many)
        expected = [grad(lambda x: loss(plain(layer, x)))(x) for x in many]
        assert relative(found, torch.stack(expected)) < 1e-8

    def test_parameters(self, layer, x):
        """Gradients of each sample, and models side by side."""
        weights = {k: v.detach() for k, v in layer.named_parameters()}

        def of_sample(weights, x):
            args = [torch.zeros_like(x[None])], x[None]
            return loss(functional_call(layer, weights, args)[0])

        found = vmap(grad(of_sample), (None, 0))(weights, x)
        for i, sample in enumerate(x):
            total = loss(plain(layer, sample[None]))
            names, parameters = zip(*layer.named_parameters(), strict=True)
            expected = torch.autograd.grad(total, parameters)
            for name, reference in zip(names, expected, strict=True):
                assert relative(found[name][i], reference) < 1e-8

        two = {k: torch.stack([v, 0.5 * v]) for k, v in weights.items()}
        found = vmap(of_sample, (0, None))(two, x[0])
        expected = [of_sample({k: v[i] for k, v in two.items()}, x[0]) for i in (0, 1)]
        assert relative(found, torch.stack(expected)) < 1e-10

    def test_nothing_of_it_is_left(self, layer, x):
        call(layer, x)
        assert layer.last_solution is not None
        grad(lambda x: loss(call(layer, x)))(x)
        assert layer.last_solution is None


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('damping', [1.0, 0.7])
def test_unrolled(x, training, damping):
    gradient = dict(type='UnrolledGradient', steps=4, damping=damping)
    layer = make(EXACT, gradient).train(training)
    if not training:
        layer.unroll_steps = 4
    expected = torch.autograd.functional.jacobian(lambda x: call(layer, x), x)
    for transform in (jacrev, jacfwd):
        assert relative(transform(lambda x: call(layer, x))(x), expected) < 1e-12
    assert vmap(lambda x: call(layer, x))(x[:, None]).shape == (2, 1, 3)


@pytest.mark.parametrize(
    'transform', [grad, jacrev, jacfwd, vmap], ids=lambda t: t.__name__
)
@pytest.mark.parametrize(
    ('training', 'solver', 'named'),
    [
        (True, FIXED['picard'], 'gradient is ImplicitGradient'),
        (False, FIXED['picard'] | dict(tol=1e-3), r'PicardSolver\(.*tol=0.001'),
        (False, EXACT | dict(tol=0), r'eval_solver is BroydenSolver'),
    ],
)
def test_others_are_refused(x, transform, training, solver, named):
    layer = make(solver).train(training)
    with pytest.raises(NotImplementedError, match=named):
        transform(lambda x: loss(call(layer, x)))(x[:, None])


def test_a_jacobian_loss_is_refused(x):
    layer = make(EXACT, dict(type='UnrolledGradient', steps=4)).train()
    layer.jacobian_probes = 1
    with pytest.raises(NotImplementedError, match=r'jacobian_probes=1: .*set it to 0'):
        grad(lambda x: loss(call(layer, x)))(x)


class TestBackbone:
    @pytest.fixture
    def backbone(self):
        solver = dict(type='AndersonSolver', max_steps=40, tol=0)
        return project_classifier(eval_solver=solver).backbone

    @pytest.fixture
    def images(self):
        return torch.randn(2, 3, 14, 11).double()

    def test_transforms(self, backbone, images):
        def of(images):
            return sum(loss(m) for m in backbone(images))

        images.requires_grad_()
        (expected,) = torch.autograd.grad(of(images), images)
        images = images.detach()
        assert relative(grad(of)(images), expected) < 1e-8
        backbone.warm_start = True
        backbone(images)
        assert relative(grad(of)(images), expected) < 1e-8
        tangent = torch.randn_like(images)
        _, found = jvp(of, (images,), (tangent,))
        assert relative(found, (tangent * expected).sum()) < 1e-8

        maps = vmap(lambda image: backbone(image[None]))(images)
        with torch.no_grad():
            expected = backbone(images)
        assert relative([m.squeeze(1) for m in maps], expected) < 1e-9


OTHERS = {
    'shared inverse': dict(type='SharedInverseGradient'),
    'reversible': dict(type='ReversibleGradient', steps=8, beta=0.5),
}


def with_gradient(name):
    if name in OTHERS:
        return make(EXACT, OTHERS[name])
    gradient, recompute = gradient_of(name, steps=60)
    return make(EXACT, gradient, recompute=recompute)


class TestSecondDerivatives:
    """A penalty on the gradient of a loss that is linear in the features."""

    @pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' in n])
    def test_of_unrolled_forms(self, x, name):
        layer = with_gradient(name)
        x.requires_grad_()
        wanted = [x, *layer.parameters()]

        def penalty(function):
            (first,) = torch.autograd.grad(
                loss(function(layer, x)), x, create_graph=True
            )
            return torch.autograd.grad(first.square().sum(), wanted)

        assert relative(penalty(call), penalty(plain)) < 1e-9

    def test_of_a_phantom_gradient_in_evaluation(self, x):
        """What follows is linear, so that hooks are given nothing to look at."""
        gradient = dict(type='PhantomGradient', steps=80, unroll=True)
        layer = make(EXACT, gradient).eval()
        x.requires_grad_()
        wanted = [x, *layer.parameters()]

        def penalty(function):
            (first,) = torch.autograd.grad(
                loss(function(layer, x)), x, create_graph=True
            )
            return torch.autograd.grad(first.square().sum(), wanted)

        assert relative(penalty(call), penalty(plain)) < 1e-9

    @pytest.mark.parametrize(
        'name', [*(n for n in GRADIENTS if 'unrolled' not in n), *OTHERS]
    )
    @pytest.mark.parametrize('training', [True, False])
    def test_others_are_an_error(self, x, name, training):
        layer = with_gradient(name).train(training)
        x.requires_grad_()
        out = call(layer, x)
        with pytest.raises(RuntimeError, match=r'no second derivatives.*Unrolled'):
            torch.autograd.grad(loss(out), x, create_graph=True)
        # Where the incoming gradient is differentiated, too.
        with pytest.raises(RuntimeError, match=r'no second derivatives.*Unrolled'):
            torch.autograd.grad(call(layer, x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='cannot be vectorised'):
            torch.autograd.grad(
                call(layer, x),
                x,
                torch.eye(6).view(6, 2, 3).double(),
                is_grads_batched=True,
            )
        (first,) = torch.autograd.grad(loss(call(layer, x)), x)
        (expected,) = torch.autograd.grad(loss(plain(layer, x)), x)
        assert relative(first, expected) < (0.2 if name in OTHERS else 1e-6)

    def test_the_loss_of_the_jacobian_has_them(self, x):
        layer = make(EXACT)
        layer.jacobian_probes = 1
        call(layer, x)
        layer.take_jacobian_loss().backward()
        assert all(p.grad is not None for p in layer.parameters())
