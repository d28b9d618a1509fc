"""The Jacobian loss over a training, through a real Runner."""

import pytest
import torch
from mmengine.hooks import Hook

from mdeq_mm.engine import JacobianScheduleHook
from mdeq_mm.models.implicit_models import EquilibriumReport
from tests.test_engine.test_hooks.conftest import Classifier

ITERATIONS = dict(by_epoch=False, max_iters=8, val_interval=100)


class Losses(EquilibriumReport):
    """What mmpretrain's and mmseg's models do around their ``loss``."""

    def forward(self, inputs, target, mode='tensor'):
        if mode == 'loss':
            return self.loss(inputs, target)
        return super().forward(inputs, target, mode)


class Plain(Classifier):
    def loss(self, inputs, target):
        return Classifier.forward(self, inputs, target, 'loss')


class Capable(Losses, Plain):
    pass


class Note(Hook):
    """Notes the losses of each iteration, and how it was set."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.losses, self.weights, self.seeds = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layer = runner.model.backbone.equilibrium
        self.losses.append({k: v.item() for k, v in outputs.items()})
        self.weights.append(runner.model.jacobian_weight)
        self.seeds.append(layer.jacobian_seed)


def train(make_runner, *hooks, seed=0, model=None, **options):
    torch.manual_seed(0)
    note = Note()
    runner = make_runner(
        [*hooks, note],
        ITERATIONS,
        model or Capable(),
        randomness=dict(seed=seed),
        **options,
    )
    runner.train()
    return runner, note


def test_the_loss_is_logged_and_weighted(make_runner):
    runner, note = train(make_runner, dict(type='JacobianScheduleHook', weight=0.5,
                                           by_epoch=False))  # fmt: skip
    for losses in note.losses:
        assert losses['loss_jac'] == pytest.approx(0.5 * losses['jacobian'])
        assert losses['jacobian'] > 0
    assert len(runner.message_hub.get_scalar('train/loss_jac').data[0]) == 8
    # After the training the model is as it was.
    assert runner.model.jacobian_weight == 0
    assert runner.model.backbone.equilibrium.jacobian_probes == 0


def test_it_lowers_the_jacobian(make_runner):
    found = []
    for weight in (0, 20.0):
        hook = dict(type='JacobianScheduleHook', weight=weight, by_epoch=False)
        # An estimate without weight, to compare.
        runner, _ = train(make_runner, hook, seed=1)
        runner.model.train()
        runner.model.set_jacobian(1e-9, probes=50, seed=3)
        images = torch.stack([runner.train_dataloader.dataset[i]['inputs']
                              for i in range(8)])  # fmt: skip
        losses = runner.model(images, torch.zeros(8).long(), 'loss')
        found.append(float(losses['jacobian']))
    assert found[1] < 0.9 * found[0]


def test_frequency_is_drawn_from_seed_and_iteration(make_runner):
    hook = dict(type='JacobianScheduleHook', frequency=0.5, by_epoch=False)
    drawn = [train(make_runner, hook, seed=s)[1].weights for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {0.0, 1.0}


def test_frequency_is_the_share_of_iterations(make_runner):
    hook = JacobianScheduleHook(frequency=0.3, by_epoch=False)
    runner = make_runner([], ITERATIONS, Capable(), randomness=dict(seed=0))
    weights = []
    hook.before_train(runner)
    for i in range(2000):
        runner.train_loop._iter = i
        hook.before_train_iter(runner, i)
        weights.append(runner.model.jacobian_weight)
    assert sum(weights) / 2000 == pytest.approx(0.3, abs=0.03)


def test_probes_differ_from_iteration_to_iteration(make_runner):
    hook = dict(type='JacobianScheduleHook', by_epoch=False)
    _, note = train(make_runner, hook)
    assert len(set(note.seeds)) == 8


def test_probes_differ_from_rank_to_rank_and_the_draw_does_not(
    make_runner, monkeypatch
):
    notes = []
    for rank in (0, 1):
        module = 'mdeq_mm.engine.hooks.jacobian_schedule_hook.get_rank'
        monkeypatch.setattr(module, lambda rank=rank: rank)
        hook = dict(type='JacobianScheduleHook', frequency=0.5, by_epoch=False)
        notes.append(train(make_runner, hook)[1])
    assert notes[0].weights == notes[1].weights
    assert not set(notes[0].seeds) & set(notes[1].seeds)


def test_processes_with_seeds_of_their_own_draw_alike(make_runner, monkeypatch):
    """With diff_rank_seed=True; the first process tells its seed."""
    module = 'mdeq_mm.engine.hooks.jacobian_schedule_hook'
    hook = dict(type='JacobianScheduleHook', frequency=0.5, by_epoch=False)
    first = train(make_runner, hook, seed=1)[1]

    def told(data, src=0):
        data[0] = 1

    monkeypatch.setattr(f'{module}.broadcast_object_list', told)
    monkeypatch.setattr(f'{module}.get_rank', lambda: 1)
    second = train(make_runner, hook, seed=2)[1]
    assert first.weights == second.weights
    assert first.seeds != second.seeds


def test_schedule():
    hook = JacobianScheduleHook(
        weight=1.0, warmup_weight=0.2, increment=0.5, increment_every=10, begin=5,
        end=30,
    )  # fmt: skip
    assert hook.weight_at(4, False) == hook.weight_at(4, True) == 0
    assert hook.weight_at(5, True) == 0.2
    assert [hook.weight_at(t, False) for t in (5, 14, 15, 25, 29, 30)] == [
        1.0, 1.0, 1.5, 2.0, 2.0, 0.0
    ]  # fmt: skip


def test_warmup_weight_while_unrolled(make_runner):
    hooks = (
        dict(type='UnrollWarmupHook', unroll_steps=2, end=3),
        dict(type='JacobianScheduleHook', warmup_weight=0, by_epoch=False),
    )
    _, note = train(make_runner, *hooks)
    assert note.weights == [0] * 3 + [1] * 5
    assert ['loss_jac' in losses for losses in note.losses] == [False] * 3 + [True] * 5


def test_a_resumed_training_draws_the_same(make_runner, resumable, tmp_path):
    hook = dict(type='JacobianScheduleHook', frequency=0.5, by_epoch=False)
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=4)
    _, whole = train(make_runner, hook, default_hooks=dict(checkpoint=checkpoint))
    _, rest = train(make_runner, hook, load_from=str(tmp_path / 'iter_4.pth'),
                    resume=True)  # fmt: skip
    assert rest.weights == whole.weights[4:]
    assert rest.seeds == whole.seeds[4:]
    for mine, theirs in zip(rest.losses, whole.losses[4:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_models_that_cannot_carry_the_loss_are_refused(make_runner):
    hook = dict(type='JacobianScheduleHook', by_epoch=False)
    with pytest.raises(ValueError, match=r'model\.type=Classifier .*: use Implicit'):
        train(make_runner, hook, model=Classifier())


def test_models_without_an_equilibrium_are_refused(make_runner):
    model = Capable()
    model.backbone = torch.nn.Flatten()
    hook = dict(type='JacobianScheduleHook', by_epoch=False)
    with pytest.raises(ValueError, match='no equilibrium layer'):
        train(make_runner, hook, model=model)


def test_epochs_without_an_epoch_loop_are_refused(make_runner):
    with pytest.raises(ValueError, match=r'JacobianScheduleHook\.by_epoch=True'):
        train(make_runner, dict(type='JacobianScheduleHook'))


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(weight=-1), ValueError, 'weight=-1'),
        (dict(weight='1'), TypeError, 'weight must be a number'),
        (dict(weight=float('nan')), ValueError, 'weight=nan'),
        (dict(frequency=0), ValueError, 'frequency=0'),
        (dict(frequency=1.5), ValueError, 'frequency=1.5'),
        (dict(probes=0), ValueError, 'probes=0'),
        (dict(warmup_weight=-1), ValueError, 'warmup_weight=-1'),
        (dict(increment=float('inf')), ValueError, 'increment=inf'),
        (dict(increment_every=0), ValueError, 'increment_every=0'),
        (dict(begin=-1), ValueError, 'begin=-1'),
        (dict(begin=5, end=4), ValueError, 'end=4'),
        (dict(begin=5, end=5), ValueError, 'end=5'),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=f'JacobianScheduleHook.{words}'):
        JacobianScheduleHook(**arguments)
