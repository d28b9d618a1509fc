"""What trainings do with a model: average it, copy it, checkpoint it, compile it."""

import copy
import shutil
from functools import partial

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import ExponentialMovingAverage
from torch.utils.checkpoint import checkpoint

from tests.helpers import relative
from tests.test_distributed.models import (
    GRADIENTS,
    batches,
    class_batch,
    class_samples,
    classifier,
    contractive_weights,
    freeze_norms,
    train,
)
from tests.test_engine.test_hooks.conftest import make_runner  # noqa: F401


@pytest.fixture(scope='module')
def weights():
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    return contractive_weights()


@pytest.fixture
def model_of(weights):
    def make(name='implicit', **backbone):
        model = classifier(**(GRADIENTS[name] | backbone)).double()
        model.backbone.load_state_dict(weights)
        model.train()
        freeze_norms(model)
        return model

    return make


# Averages


class Weights(Hook):
    """Notes a weight of f before training and after each iteration."""

    # Before the average takes part, which exchanges weights in validation alone.
    priority = 'VERY_HIGH'

    def weight(self, runner):
        f = runner.model.backbone.equilibrium.f
        return torch.cat([p.detach().flatten().double() for p in f.parameters()])

    def before_train(self, runner):
        self.seen = [self.weight(runner)]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(self.weight(runner))


def test_averages_are_those_of_the_closed_form(make_runner):  # noqa: F811
    """m (1 - m)^i of the weights i steps ago, of weight-normalised ones too."""
    noted, ema = Weights(), EMAHook(momentum=0.1)
    train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=3)
    runner = make_runner([noted, ema], train_cfg)
    runner.train()
    assert isinstance(ema.ema_model, ExponentialMovingAverage)
    # The first step is taken as it is.
    expected = noted.seen[1]
    for weight in noted.seen[2:]:
        expected = 0.9 * expected + 0.1 * weight
    average = ema.ema_model.module.backbone.equilibrium.f
    found = torch.cat([p.detach().flatten().double() for p in average.parameters()])
    assert len(noted.seen) == 7
    assert relative(found, expected) < 1e-6
    assert relative(found, noted.seen[-1]) > 1e-5
    # Evaluations take the averages, and what is trained is there again after them.
    assert torch.equal(noted.weight(runner), noted.seen[-1])


# Copies


def losses_of(model, images, labels):
    return model.parse_losses(model(images, class_samples(labels), mode='loss'))[0]


@pytest.mark.parametrize(
    'name', ['implicit, warm', 'phantom unrolled', 'shared inverse, fallback']
)
@pytest.mark.parametrize('moment', ['forward', 'backward', 'evaluation'])
def test_a_copy_of_a_model_in_training_trains_on_like_it(model_of, name, moment):
    model = model_of(name)
    model.set_jacobian(0.5, probes=1, seed=3)
    first, *rest = batches(4)
    if moment == 'evaluation':
        model.eval()
        with torch.no_grad():
            model(first[0])
        model.train()
    else:
        loss = losses_of(model, *first)
        # A pass whose Jacobian loss nobody asked for yet.
        model.extract_feat(first[0])
        if moment == 'backward':
            loss.backward()
    twin = copy.deepcopy(model)
    # What a call has left stays with the one that made it.
    assert model.backbone.last_solution is not None
    assert twin.backbone.last_solution is None
    assert twin.backbone.equilibrium.take_jacobian_loss() is None
    if moment == 'forward':
        # The graph of the original is whole.
        loss.backward()
        model.zero_grad()
    if moment != 'evaluation':
        # It is of that backward pass.
        twin.backbone.equilibrium.forget()
        model.backbone.equilibrium.forget()
    model.zero_grad()
    twin.zero_grad()
    data = [class_batch(*batch) for batch in rest]
    results = [train(m, data) for m in (model, twin)]
    for key, weight in results[0]['weights'].items():
        assert torch.equal(weight, results[1]['weights'][key]), key
    assert results[0]['losses'] == results[1]['losses']


# Recomputation of the whole backbone


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize(
    ('name', 'with_cp'),
    [*((name, False) for name in GRADIENTS), ('implicit', True), ('unrolled', True)],
)
def test_checkpointing_the_backbone(model_of, name, with_cp, use_reentrant):
    """Outside of it, around whatever it recomputes by itself."""
    images, labels = next(batches())
    expected, found = [], []
    for grads, whole in ((expected, False), (found, True)):
        model = model_of(name, with_cp=with_cp)
        # The older kind needs an input that takes gradients.
        x = images.clone().requires_grad_()
        run = partial(checkpoint, model.backbone, use_reentrant=use_reentrant)
        maps = (run if whole else model.backbone)(x)
        loss = model.head.loss(model.neck(maps), class_samples(labels))['loss']
        loss.backward()
        grads += [x.grad, *(p.grad for p in model.parameters())]
    assert any(g.abs().max() > 1e-4 for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# Compilation


class Losses(Hook):
    """Notes the loss of each iteration."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('how', [dict(backend='eager'), True])
def test_a_compiled_training(make_runner, monkeypatch, tmp_path, how):  # noqa: F811
    """``compile`` of the Runner; ``eager`` traces the model and compiles no code."""
    if how is True and not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
        pytest.skip('PyTorch compiles C++, and there is no compiler')
    # Not what a compilation that was broken off has left.
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'inductor'))
    torch.compiler.reset()
    losses = []
    for compiled in (False, how):
        noted = Losses()
        torch.manual_seed(0)
        runner = make_runner(
            [noted],
            dict(by_epoch=True, max_epochs=1, val_interval=100),
            randomness=dict(seed=0),
        )
        runner.cfg = Config(dict(compile=compiled, **runner.cfg))
        runner.train()
        losses.append(noted.losses)
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
