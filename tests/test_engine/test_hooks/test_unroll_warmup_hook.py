import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import nn

from mdeq_mm.engine import UnrollWarmupHook
from mdeq_mm.implicit.layer import equilibrium_layers
from mdeq_mm.registry import HOOKS
from tests.helpers import (
    logged,
    logits_of,
    project_classifier,
    project_golden,
    relative,
)

from .conftest import Classifier, watched

BY_ITER = dict(by_epoch=False, max_iters=6, val_interval=2)


def hook(**options):
    return dict(type='UnrollWarmupHook', unroll_steps=2, **options)


def unrolled(found):
    """Which entries were unrolled, checked by the evaluations they took."""
    result = {}
    for when, (steps, evaluations) in found:
        assert steps in (2, None)
        assert (evaluations == 2) == (steps == 2)
        result[when] = steps == 2
    return result


def test_by_iteration(make_runner):
    runner = make_runner([hook(end=4)], BY_ITER)
    with logged() as texts:
        runner.train()
    watch = watched(runner)
    assert unrolled(watch.train) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    # Validation shows what was trained.
    assert unrolled(watch.val) == {2: True, 4: True, 6: False}
    told = [t for t in texts if 'unrolled' in t or 'equilibrium' in t]
    assert told == [
        'Training unrolled, 2 evaluations of f, until iteration 4.',
        'Training at the equilibrium from iteration 4 on.',
    ]


def test_by_iteration_in_a_loop_over_epochs(make_runner):
    runner = make_runner([hook(end=3)])
    runner.train()
    watch = watched(runner)
    assert unrolled(watch.train) == {0: 1, 1: 1, 2: 1, 3: 0, 4: 0, 5: 0}
    assert unrolled(watch.val) == {2: True, 4: False, 6: False}


def test_by_epoch(make_runner):
    runner = make_runner([hook(end=2, by_epoch=True)])
    with logged() as texts:
        runner.train()
    watch = watched(runner)
    assert unrolled(watch.train) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    assert unrolled(watch.val) == {2: True, 4: True, 6: False}
    assert any('until epoch 2.' in text for text in texts)
    assert 'Training at the equilibrium from epoch 3 on.' in texts


@pytest.mark.parametrize(
    ('share', 'last'), [(0.5, 3), (0.34, 2), (0.0, 0), (1.0, 6)], ids=str
)
def test_a_share_of_a_loop_over_iterations(make_runner, share, last):
    runner = make_runner([hook(end=share)], BY_ITER)
    with logged() as texts:
        runner.train()
    assert unrolled(watched(runner).train) == {i: i < last for i in range(6)}
    assert any(f'until iteration {last}.' in text for text in texts) == (last > 0)
    assert any('is not reached in this training run of 6' in t for t in texts) == (
        share == 1
    )


@pytest.mark.parametrize(('epochs', 'last'), [(3, 3), (4, 4)])
def test_a_share_of_the_iterations_in_a_loop_over_epochs(make_runner, epochs, last):
    """Of two iterations an epoch; longer training has a longer phase."""
    cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=9)
    runner = make_runner([hook(end=0.5)], cfg)
    runner.train()
    assert unrolled(watched(runner).train) == {i: i < last for i in range(2 * epochs)}


@pytest.mark.parametrize(('share', 'last'), [(0.5, 4), (0.25, 2), (0.26, 2)])
def test_a_share_of_the_epochs(make_runner, share, last):
    cfg = dict(by_epoch=True, max_epochs=4, val_interval=9)
    runner = make_runner([hook(end=share, by_epoch=True)], cfg)
    with logged() as texts:
        runner.train()
    assert unrolled(watched(runner).train) == {i: i < last for i in range(8)}
    assert f'Training at the equilibrium from epoch {last // 2 + 1} on.' in texts


@pytest.mark.usefixtures('resumable')
def test_a_share_after_a_resume(make_runner, tmp_path):
    """It is of the whole training run, not of what is left."""
    make_runner([hook(end=0.5)]).train()
    again = make_runner(
        [hook(end=0.5)], resume=True, load_from=str(tmp_path / 'epoch_1.pth')
    )
    again.train()
    assert unrolled(watched(again).train) == {2: 1, 3: 0, 4: 0, 5: 0}


def test_never(make_runner):
    runner = make_runner([hook(end=0)])
    with logged() as texts:
        runner.train()
    assert not any(unrolled(watched(runner).train).values())
    assert not any('equilibrium from' in text for text in texts)


def test_longer_than_the_training(make_runner):
    runner = make_runner([hook(end=100)])
    with logged() as texts:
        runner.train()
    assert all(unrolled(watched(runner).train).values())
    # A training that is over is not said to go on.
    assert not any('equilibrium from' in text for text in texts)
    assert any('end=100 is not reached in this training run of 6' in t for t in texts)
    assert runner.model.backbone.equilibrium.unroll_steps is None


def test_testing_always_solves(make_runner):
    runner = make_runner([hook(end=100)])
    runner.test()
    runner.train()
    runner.test()
    for steps, evaluations in watched(runner).test:
        assert steps is None
        assert evaluations > 2


@pytest.mark.usefixtures('resumable')
@pytest.mark.parametrize(('end', 'expected'), [(3, {4: 0, 5: 0}), (5, {4: 1, 5: 0})])
def test_after_a_resume(make_runner, end, expected):
    first = make_runner([hook(end=end)], dict(by_epoch=True, max_epochs=2))
    first.train()
    again = make_runner([hook(end=end)], resume=True)
    again.train()
    assert unrolled(watched(again).train) == expected


@pytest.mark.usefixtures('resumable')
def test_after_a_resume_by_epoch(make_runner):
    make_runner([hook(end=2, by_epoch=True)], dict(by_epoch=True, max_epochs=1)).train()
    again = make_runner([hook(end=2, by_epoch=True)], resume=True)
    again.train()
    assert unrolled(watched(again).train) == {2: 1, 3: 1, 4: 0, 5: 0}


@pytest.mark.usefixtures('resumable')
def test_after_a_resume_by_iteration(make_runner):
    first = make_runner(
        [hook(end=3)],
        dict(by_epoch=False, max_iters=2, val_interval=2),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)
        ),
    )
    first.train()
    again = make_runner([hook(end=3)], BY_ITER, resume=True)
    again.train()
    assert unrolled(watched(again).train) == {2: 1, 3: 0, 4: 0, 5: 0}


def test_twice_with_one_runner(make_runner):
    """A hook that trained once starts anew."""
    runner = make_runner(
        [hook(end=4)], dict(by_epoch=False, max_iters=3, val_interval=9)
    )
    runner.train()
    assert all(unrolled(watched(runner).train).values())
    warmup = next(h for h in runner.hooks if isinstance(h, UnrollWarmupHook))
    warmup.before_train(runner)
    assert runner.model.backbone.equilibrium.unroll_steps == 2


def test_gradients_of_the_first_phase_are_those_of_unrolling(make_runner):
    runner = make_runner([hook(end=100)])
    runner.model.init_weights()
    seen = []
    model = runner.model
    forward = model.backbone.equilibrium.forward

    def watch(*inputs):
        seen.append(model.backbone.equilibrium.unroll_steps)
        return forward(*inputs)

    model.backbone.equilibrium.forward = watch
    runner.train()
    assert set(seen) == {2}


def test_a_model_without_an_equilibrium_is_refused(make_runner):
    class Plain(BaseModel):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, inputs, target, mode='tensor'):
            raise AssertionError('trained')

    runner = make_runner([hook(end=3)], model=Plain())
    with pytest.raises(ValueError, match=r"no equilibrium layer: .*type='MDEQ'"):
        runner.train()


def test_epochs_under_a_loop_over_iterations_are_refused(make_runner):
    """Such a loop stays in its first epoch, so that the phase would not end."""
    runner = make_runner([hook(end=2, by_epoch=True)], BY_ITER)
    with pytest.raises(ValueError, match=r'by_epoch=True .*by_epoch=False'):
        runner.train()


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(unroll_steps=0), ValueError, r'UnrollWarmupHook.unroll_steps=0 .*1 or'),
        (dict(unroll_steps=2.0), TypeError, r'unroll_steps must be an integer, got 2'),
        (dict(end=-1), ValueError, r'UnrollWarmupHook.end=-1 .*0 or more'),
        (dict(end=None), TypeError, r'end must be an integer, got None'),
        (dict(end=True), TypeError, r'end must be an integer, got True'),
        (dict(end='half'), TypeError, r"end must be an integer, got 'half'"),
        (
            dict(end=1.5),
            ValueError,
            r'Hook.end=1.5 .*share .*0.0 to 1.0, or an integer',
        ),
        (dict(end=-0.1), ValueError, r'UnrollWarmupHook.end=-0.1 .*0.0 to 1.0'),
        (dict(end=float('nan')), ValueError, r'UnrollWarmupHook.end=nan .*0.0 to 1.0'),
        (dict(stop=3), TypeError, r'stop'),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        HOOKS.build(dict(type='UnrollWarmupHook', **options))


def test_layers_are_found_in_wrapped_models():
    model = Classifier()
    layer = model.backbone.equilibrium
    assert equilibrium_layers(model) == [layer]
    assert equilibrium_layers(nn.DataParallel(model)) == [layer]
    assert equilibrium_layers(nn.Linear(2, 2)) == []
    both = nn.ModuleList([model, Classifier()])
    assert len(equilibrium_layers(both)) == 2
    assert torch.equal(both[0].head.weight, model.head.weight)


class Given(Hook):
    """Puts residuals in the place of what the unrolled iteration found."""

    priority = 'HIGHEST'

    def __init__(self, residuals):
        self.residuals = residuals

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layer = runner.model.backbone.equilibrium
        residual = layer.last_solution.residual
        residual.fill_(self.residuals[runner.iter])


class TestThreshold:
    ITERATIONS = dict(by_epoch=False, max_iters=8, val_interval=100)

    def train(self, make_runner, residuals, end=7, readings=2, **options):
        hooks = (
            Given(residuals),
            dict(type='UnrollWarmupHook', unroll_steps=2, end=end, threshold=0.1,
                 interval=1, readings=readings),
        )  # fmt: skip
        runner = make_runner(hooks, self.ITERATIONS, **options)
        with logged() as self.said:
            runner.train()
        unrolled = [steps is not None for _, (steps, _) in watched(runner).train]
        return runner, unrolled

    def test_leaves_after_readings_in_a_row(self, make_runner):
        residuals = [1, 0.09, 0.2, 0.05, 0.09, 1, 1, 1]
        _, unrolled = self.train(make_runner, residuals)
        assert unrolled == [True] * 5 + [False] * 3

    def test_leaves_at_the_end_at_the_latest(self, make_runner):
        _, unrolled = self.train(make_runner, [1] * 8)
        assert unrolled == [True] * 7 + [False]

    def test_does_not_come_back(self, make_runner):
        _, unrolled = self.train(make_runner, [0, 0] + [1] * 6)
        assert unrolled == [True] * 2 + [False] * 6

    @pytest.mark.parametrize('stop', [1, 2, 4])
    def test_its_state_survives_a_resume(self, make_runner, resumable, tmp_path, stop):
        """Stopped with one reading of two, at the second one, and after it."""
        residuals = [0, 0] + [1] * 6
        _, whole = self.train(
            make_runner,
            residuals,
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)
            ),
        )
        _, rest = self.train(
            make_runner,
            residuals,
            load_from=str(tmp_path / f'iter_{stop}.pth'),
            resume=True,
        )
        assert rest == whole[stop:]

    def test_weights_alone_carry_no_state(self, make_runner, resumable, tmp_path):
        self.train(
            make_runner,
            [0] * 8,
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=8)
            ),
        )
        _, unrolled = self.train(
            make_runner, [1] * 8, load_from=str(tmp_path / 'iter_8.pth')
        )
        assert unrolled == [True] * 7 + [False]

    def test_a_long_end_is_no_reason_to_warn(self, make_runner):
        self.train(make_runner, [0] * 8, end=1000)
        said = self.said
        assert not any('is not reached' in line for line in said)
        assert any('until iteration 1000 or a residual of 0.1' in line for line in said)
        assert any('the equilibrium is there' in line for line in said)

    @pytest.mark.parametrize(
        ('arguments', 'words'),
        [
            (dict(threshold=-1), 'threshold=-1'),
            (dict(threshold=0, end=5), 'threshold=0 with end=5'),
            (dict(threshold=0.1), 'threshold=0.1 with end=0'),
            (dict(threshold=0.1, end=5, interval=0), 'interval=0'),
            (dict(threshold=0.1, end=5, readings=0), 'readings=0'),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, words):
        with pytest.raises(ValueError, match=f'UnrollWarmupHook.{words}'):
            UnrollWarmupHook(**arguments)


def test_switching_does_not_jump_the_loss_on_a_contractive_model():
    """Many unrolled steps and the solve give one loss and one gradient."""
    model = project_classifier().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    golden = project_golden()
    found = []
    for steps in (60, None):
        model.backbone.equilibrium.unroll_steps = steps
        logits = logits_of(model, golden['input'].double())
        loss = torch.nn.functional.cross_entropy(logits, golden['target'])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append((loss.item(), [g for g in grads if g is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert relative(found[0][1], found[1][1]) < 1e-6
