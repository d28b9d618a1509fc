"""What becomes of steps with faults, through a real Runner."""

import json
import math
import subprocess
import sys

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import nn

from mdeq_mm.engine.optim_wrappers import (
    EquilibriumFailure,
    EquilibriumOptimWrapper,
)
from mdeq_mm.implicit import Status
from tests.helpers import ROOT, logged

from ..test_hooks.conftest import Classifier
from .conftest import (
    LR,
    adjoint_status,
    f_output,
    forward_status,
    gradient,
    image,
    layer_of,
    solver_step,
    training,
    weight,
)

NAN, INF = math.nan, math.inf
EVERY = [0, 1, 2, 3, 4, 5]

# What is not finite, whatever the policy, and in whose words.
BROKEN = {
    'nan in an image': (image(NAN), 'buffers'),
    'inf in an image': (image(INF), 'buffers'),
    'nan gradient': (gradient(NAN), 'gradients'),
    'inf gradient': (gradient(-INF), 'gradients'),
    'gradient whose square overflows': (gradient(1e30), 'gradients'),
}
# Failed solves whose gradients the layer kept finite.
FAILED = {
    'forward diverged': (forward_status(), 'in the forward solve'),
    'adjoint diverged': (adjoint_status(), 'in the backward solve'),
    'residual of f infinite': (f_output, 'in the forward solve'),
}


def finite(state):
    return all(v.isfinite().all() for v in state.values())


def check_counters(runner, diary):
    """All that counts is as in an undisturbed training."""
    assert diary.counts == [1, 2, 3, 4, 5, 6]
    assert diary.lr == pytest.approx(LR)
    assert runner.iter == 6
    assert runner.optim_wrapper.inner_count == 6


def test_without_faults_all_is_as_with_the_parent(tmp_path):
    states = []
    for kind in ('OptimWrapper', 'EquilibriumOptimWrapper'):
        torch.manual_seed(0)
        runner, diary = training(
            tmp_path / kind, type=kind, clip_grad=dict(max_norm=0.1)
        )
        with logged() as texts:
            runner.train()
        check_counters(runner, diary)
        assert diary.changed() == EVERY
        states.append(diary.states[-1])
        assert not any('Iteration' in text for text in texts)
        # No dropped step, no number of dropped steps in the log.
        assert 'train/skipped_steps' not in runner.message_hub.log_scalars
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize('name', BROKEN)
@pytest.mark.parametrize('policy', ['warn', 'skip'])
def test_what_is_not_finite_is_dropped(tmp_path, policy, name):
    fault, said = BROKEN[name]
    runner, diary = training(
        tmp_path, fault, [2], policy=policy, clip_grad=dict(max_norm=1.0)
    )
    with logged() as texts:
        runner.train()
    assert diary.changed() == [0, 1, 3, 4, 5]
    assert all(finite(state) for state in diary.states)
    check_counters(runner, diary)
    assert runner.optim_wrapper.skipped == 1
    assert runner.message_hub.get_scalar('train/skipped_steps').current() == 1
    # Gradients that are not sound are not clipped either.
    norms = runner.message_hub.get_scalar('train/grad_norm').data[0]
    assert len(norms) == 5 and max(norms) < INF
    (told,) = [t for t in texts if t.startswith('Iteration')]
    assert told.startswith('Iteration 3: dropped the step (1 of the last 3) for non-')
    assert said in told


@pytest.mark.parametrize('name', FAILED)
def test_warn_goes_on(tmp_path, name):
    fault, said = FAILED[name]
    runner, diary = training(tmp_path, fault, [2, 3], policy='warn')
    with logged() as texts:
        runner.train()
    assert diary.changed() == EVERY
    assert all(finite(state) for state in diary.states)
    check_counters(runner, diary)
    assert runner.optim_wrapper.skipped == 0
    # The second one comes too soon after the first.
    (told,) = [t for t in texts if t.startswith('Iteration')]
    assert told.startswith('Iteration 3: failed solves (1 of 4 samples in the')
    assert said in told
    assert told.endswith(Status.DIVERGED.advice)


@pytest.mark.parametrize('name', FAILED)
def test_skip_drops(tmp_path, name):
    fault, said = FAILED[name]
    runner, diary = training(tmp_path, fault, [2, 3], policy='skip', warn_interval=1)
    with logged() as texts:
        runner.train()
    assert diary.changed() == [0, 1, 4, 5]
    check_counters(runner, diary)
    assert runner.optim_wrapper.skipped == 2
    first, second = [t for t in texts if t.startswith('Iteration')]
    assert first.startswith('Iteration 3: dropped the step (1 of the last 3) for fail')
    assert second.startswith('Iteration 4: dropped the step (2 of the last 4) for')
    assert said in first and said in second


@pytest.mark.parametrize('name', [*BROKEN, *FAILED])
@pytest.mark.parametrize('report', [True, False])
def test_stop_ends_the_training(tmp_path, name, report):
    fault, said = (BROKEN | FAILED)[name]
    runner, diary = training(tmp_path, fault, [2], report, policy='stop')
    with pytest.raises(EquilibriumFailure) as caught:
        runner.train()
    assert said in str(caught.value)
    assert diary.changed() == [0, 1]
    assert all(finite(state) for state in diary.states)
    files = {p.name for p in tmp_path.iterdir() if p.suffix in ('.pth', '.json')}
    if not report:
        assert files == {'epoch_1.pth'}
        assert 'add FailureReportHook' in str(caught.value)
        return
    assert files == {'epoch_1.pth', 'stopped_iter_3.pth', 'failure_report.json'}
    assert 'failure_report.json' in str(caught.value)
    assert 'stopped_iter_3.pth' in str(caught.value)
    found = torch.load(tmp_path / 'stopped_iter_3.pth', weights_only=False)
    assert found['meta']['iter'] == 3
    before = diary.states[2]
    assert all(torch.equal(v, before[k]) for k, v in found['state_dict'].items())
    assert found['optimizer']['param_groups'][0]['lr'] == pytest.approx(LR[3])
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_1.pth')


@pytest.mark.parametrize('name', ['head.weight', 'stem', 'equilibrium.f'])
@pytest.mark.parametrize('policy', ['warn', 'skip', 'stop'])
def test_damaged_weights(tmp_path, policy, name):
    """Nothing mends them: the training ends, and good checkpoints are not replaced."""
    names = [n for n, _ in Classifier().named_parameters()]
    name = next(n for n in names if name in n)
    runner, diary = training(
        tmp_path, weight(name), [2], policy=policy, max_skips=1, window=5
    )
    with pytest.raises(EquilibriumFailure, match='go back to an earlier checkpoint'):
        runner.train()
    stopped = json.loads((tmp_path / 'failure_report.json').read_text())
    assert stopped['iteration'] == 3 and stopped['skipped_steps'] == 1
    assert stopped['checkpoint'] is None
    assert not list(tmp_path.glob('stopped_iter_*.pth'))
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    for state in diary.states[3:]:
        kept = {k: v for k, v in state.items() if k != name}
        assert finite(kept)
        assert all(torch.equal(v, diary.states[2][k]) for k, v in kept.items())


def test_a_solver_with_steps_of_nan_is_no_failure(tmp_path):
    """The loop of all solvers takes f(z) in their place."""
    runner, diary = training(tmp_path, solver_step, [2], policy='stop')
    runner.train()
    assert diary.changed() == EVERY


@pytest.mark.parametrize('status', [Status.MAX_STEPS, Status.STALLED])
@pytest.mark.parametrize('fault', [forward_status, adjoint_status])
def test_other_ends_never_act(tmp_path, fault, status):
    runner, diary = training(
        tmp_path, fault(status, residual=0.9), EVERY, policy='stop'
    )
    runner.train()
    assert diary.changed() == EVERY


@pytest.mark.parametrize('fault', [forward_status, adjoint_status])
def test_limit(tmp_path, fault):
    """Above it a sample has failed, however its solve ended."""
    high, low = fault(Status.MAX_STEPS, 7.1), fault(Status.MAX_STEPS, 6.9)
    for name, inject, changed in (('a', high, [0, 1, 4, 5]), ('b', low, EVERY)):
        runner, diary = training(
            tmp_path / name, inject, [2, 3], policy='skip', limit=7.0
        )
        with logged() as texts:
            runner.train()
        assert diary.changed() == changed
        told = [t for t in texts if t.startswith('Iteration')]
        if name == 'a':
            assert 'worst residual 7.1e+00' in told[0]
            assert told[0].endswith(Status.MAX_STEPS.advice)
        else:
            assert not told


def test_limit_is_relative_under_an_absolute_norm(tmp_path):
    class Sized(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone.equilibrium.solver.norm = 'abs'

    seen = []

    def mark(runner, data_batch):
        def note(layer, inputs, output):
            solution = layer.last_solution
            size = solution.value.norm(dim=1)
            # A share of the size that is the sample's own.
            solution.residual = size * torch.tensor([0.1, 0.2, 0.3, 0.5])
            solution.status[:] = Status.MAX_STEPS
            seen.append(size)

        return layer_of(runner).register_forward_hook(note).remove

    for limit, count in ((0.4, 1), (0.25, 2), (0.6, 0)):
        runner, _ = training(
            tmp_path / str(limit), mark, EVERY, model=Sized(), limit=limit
        )
        # The backward solve is relative in any case.
        runner.model.backbone.equilibrium.gradient.solver.tol = 1e-3
        with logged() as texts:
            _quiet_adjoint(runner)
            runner.train()
        told = [t for t in texts if t.startswith('Iteration')]
        if count:
            assert f'({count} of 4 samples in the forward solve, worst' in told[0]
        else:
            assert not told
    assert all((size > 2).all() for size in seen)


def _quiet_adjoint(runner):
    """Backward solves without a residual."""
    adjoint_status(Status.CONVERGED, 0.0)(runner, None)
    gradient = layer_of(runner).gradient
    marked = gradient._adjoint

    def all_of_them(*args):
        y, solution = marked(*args)
        solution.residual.zero_()
        return y, solution

    gradient._adjoint = all_of_them


@pytest.mark.parametrize('warmup', [True, False])
def test_limit_does_not_apply_where_nothing_is_solved(tmp_path, warmup):
    model = Classifier()
    if warmup:
        model.backbone.equilibrium.unroll_steps = 2
    runner, diary = training(
        tmp_path, model=model, policy='skip', limit=1e-9, max_skips=50
    )
    runner.train()
    assert diary.changed() == (EVERY if warmup else [])


@pytest.mark.parametrize('at', [2, 3])
def test_accumulation_drops_the_whole_step(tmp_path, at):
    """Two batches make a step, so that batches 2 and 3 are one."""
    for name, fault, policy in (
        ('failed', forward_status(), 'skip'),
        ('broken', image(NAN), 'warn'),
    ):
        runner, diary = training(
            tmp_path / name, fault, [at], policy=policy, accumulative_counts=2
        )
        runner.train()
        check_counters(runner, diary)
        # Batches change the buffers; weights change in every second one.
        head = [s['head.weight'] for s in diary.states]
        assert [i for i in range(6) if not torch.equal(head[i], head[i + 1])] == [1, 5]
        before, after = diary.states[2], diary.states[4]
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert finite(diary.states[-1])
        assert runner.optim_wrapper.skipped == 1
        assert all(p.grad is None for p in runner.model.parameters())


def test_accumulation_goes_on_as_if_the_step_had_not_been(tmp_path):
    """No gradient of a dropped step is left for the next one."""
    states = []
    for name, fault in (('a', image(NAN)), ('b', gradient(NAN))):
        torch.manual_seed(0)
        runner, diary = training(tmp_path / name, fault, [0], accumulative_counts=2)
        runner.train()
        first, _, after = diary.states[:3]
        assert all(torch.equal(first[k], after[k]) for k in first)
        states.append(diary.states[-1])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_window(tmp_path):
    """Two of the last three are allowed, wherever they lie; three are not."""
    options = dict(policy='skip', max_skips=2, window=3)
    fault = forward_status()
    runner, diary = training(tmp_path / 'a', fault, [0, 1, 3, 4], **options)
    runner.train()
    assert diary.changed() == [2, 5]
    runner, diary = training(tmp_path / 'b', fault, [1, 3, 4, 5], **options)
    with pytest.raises(
        EquilibriumFailure,
        match=r'iteration 6: more than max_skips=2 of the last 3 steps were dropped, '
        r'this one for failed solves \(1 of 4 samples in the forward solve, worst',
    ):
        runner.train()
    assert diary.changed() == [0, 2]
    # Under 'warn' nothing ever stops.
    runner, diary = training(
        tmp_path / 'c', image(NAN), EVERY, policy='warn', max_skips=0, window=1
    )
    runner.train()
    assert diary.changed() == []


def test_average_of_weights(tmp_path):
    """It advances over dropped steps, with the weights as they are."""
    from mmengine.hooks import EMAHook

    ema = EMAHook(momentum=0.1)
    runner, diary = training(tmp_path, image(NAN), [2, 3], hooks=[ema], policy='warn')
    runner.train()
    check_counters(runner, diary)
    assert ema.ema_model.steps == 6
    wanted = None
    for state in diary.states[1:]:
        new = state['head.weight']
        wanted = new if wanted is None else wanted.lerp(new, 0.1)
    averaged = ema.ema_model.module.head.weight
    assert torch.allclose(averaged, wanted, atol=1e-7)
    assert finite(ema.ema_model.state_dict())


def test_report(tmp_path):
    from mmengine.structures import BaseDataElement

    def fault(runner, data_batch):
        data_batch['data_samples'] = [
            BaseDataElement(metainfo=dict(img_path=f'{i}.png')) for i in range(4)
        ]
        first = forward_status(residual=INF)(runner, data_batch)
        second = adjoint_status(residual=12.5)(runner, data_batch)
        return lambda: (first(), second())

    class Lenient(Classifier):
        def forward(self, inputs, target, mode='tensor', data_samples=None):
            return super().forward(inputs, target, mode)

    runner, _ = training(
        tmp_path, fault, [3], model=Lenient(), policy='stop', accumulative_counts=2
    )
    with pytest.raises(EquilibriumFailure) as caught:
        runner.train()
    report = json.loads((tmp_path / 'failure_report.json').read_text())
    assert report['iteration'] == 4
    assert report['epoch'] == 2
    assert report['policy'] == 'stop'
    assert report['limit'] is None
    assert report['skipped_steps'] == 1
    assert report['reason'] == (
        'failed solves (1 of 8 samples in the forward solve and 1 of 8 samples in the '
        'backward solve, worst residual inf)'
    )
    assert report['advice'] + '.' == Status.DIVERGED.advice
    assert report['checkpoint'] == str(tmp_path / 'stopped_iter_4.pth')
    (process,) = report['processes']
    assert process['rank'] == 0
    good, bad = process['batches']
    assert good['samples'] == []
    assert [s['img_path'] for s in bad['samples']] == [f'{i}.png' for i in range(4)]
    assert 0 < good['loss'] < 5
    forward, adjoint = bad['solves']
    solution = layer_of(runner).last_solution
    for found, kind, wanted in (
        (forward, 'forward', solution),
        (adjoint, 'adjoint', solution.adjoint),
    ):
        assert found['kind'] == kind
        assert found['status'][0] == 'diverged'
        assert found['failed'] == [True, False, False, False]
        assert found['steps'] == wanted.steps.tolist()
        assert found['residual'][1:] == wanted.residual[1:].tolist()
    assert forward['residual'][0] == 'inf'
    assert adjoint['residual'][0] == 12.5
    assert [s['failed'] for s in good['solves']] == [[False] * 4] * 2
    assert str(caught.value) == (
        f'The training ends at iteration 4: {report["reason"]}. '
        f'{report["advice"]}. See {tmp_path}/failure_report.json, and '
        f'{tmp_path}/stopped_iter_4.pth for the state before this step.'
    )


def test_a_report_that_cannot_be_written(tmp_path):
    """The training ends as it should, and the checkpoint is there."""
    runner, _ = training(tmp_path, forward_status(), [2], policy='stop')
    (tmp_path / 'failure_report.json').mkdir()
    with pytest.raises(EquilibriumFailure, match='The report could not be written: '):
        runner.train()
    assert (tmp_path / 'stopped_iter_3.pth').exists()


def test_a_training_resumes_from_where_it_stopped(tmp_path, resumable):
    options = dict(policy='stop')
    runner, diary = training(tmp_path / 'a', forward_status(), [2], **options)
    with pytest.raises(EquilibriumFailure):
        runner.train()
    before = diary.states[2]
    runner, diary = training(tmp_path / 'b', **options)
    runner._load_from = str(tmp_path / 'a' / 'stopped_iter_3.pth')
    runner._resume = True
    runner.train()
    assert all(torch.equal(before[k], diary.states[0][k]) for k in before)
    # The epoch in which it stopped, the second of three, begins anew.
    assert diary.counts == [4, 5, 6, 7]
    assert diary.lr[0] == pytest.approx(LR[3])


def test_all_solves_of_a_step_count(tmp_path):
    """Here of two forward passes, of which the first one fails."""

    class Twice(Classifier):
        def forward(self, inputs, target, mode='tensor'):
            if mode == 'loss':
                self.backbone(inputs)
                assert self.backbone.equilibrium.last_solution.status[0] == 3
                first()
            return super().forward(inputs, target, mode)

    def fault(runner, data_batch):
        nonlocal first
        first = forward_status()(runner, data_batch)

    first = None
    runner, diary = training(tmp_path, fault, EVERY, model=Twice(), policy='skip')
    with logged() as texts:
        runner.train()
    assert diary.changed() == []
    (told,) = [t for t in texts if t.startswith('Iteration')]
    assert '(1 of 8 samples in the forward solve, worst' in told


class Line:
    """A wrapped weight of 1, and steps on w * factor."""

    def __init__(self, **options):
        self.weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([self.weight], lr=0.5)
        self.wrapper = EquilibriumOptimWrapper(optimizer, **options)

    def step(self, factor):
        self.wrapper.update_params((self.weight * factor).sum())
        return self.weight.item()


def test_without_a_runner():
    line = Line(policy='skip', max_skips=1, window=2)
    assert [line.step(f) for f in (0.5, NAN, 0.5)] == [0.75, 0.75, 0.5]
    assert line.step(NAN) == 0.5
    with pytest.raises(EquilibriumFailure, match='iteration 5: more than max_skips=1'):
        line.step(INF)
    assert line.weight.item() == 0.5


def test_ends_where_the_hook_did_not():
    line = Line(policy='stop')
    line.wrapper.watched = True
    assert line.step(NAN) == 1.0
    with pytest.raises(EquilibriumFailure, match='iteration 1: non-finite loss and gr'):
        line.step(0.5)
    assert line.weight.item() == 1.0


def test_a_forward_pass_that_raised_is_forgotten():
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrapper = EquilibriumOptimWrapper(optimizer, policy='stop')
    layer = model.backbone.equilibrium

    def lose(*_):
        layer.last_solution.status[:] = Status.DIVERGED
        raise MemoryError

    handle = model.head.register_forward_hook(lose)
    data = dict(inputs=torch.randn(2, 3, 8, 8), target=torch.tensor([0, 1]))
    with pytest.raises(MemoryError):
        model.train_step(data, wrapper)
    handle.remove()
    # No hook of the wrapper is left either.
    assert not layer._forward_hooks
    model.train_step(data, wrapper)
    assert wrapper.skipped == 0
    assert wrapper.inner_count == 1


class Linear(BaseModel):
    """No equilibrium."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 2)
        # Infinities that are there by intention.
        self.register_buffer('mask', torch.tensor([0.0, -INF]))

    def forward(self, inputs, target, mode='tensor'):
        logits = self.head(inputs.flatten(1))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, target))
        return list(logits)


def test_models_without_equilibrium(tmp_path):
    runner, diary = training(
        tmp_path / 'a', image(NAN), [2], model=Linear(), policy='stop'
    )
    with pytest.raises(EquilibriumFailure, match='non-finite loss and gradients'):
        runner.train()
    assert diary.changed() == [0, 1]
    runner, diary = training(tmp_path / 'b', image(NAN), [2], model=Linear())
    with logged() as texts:
        runner.train()
    assert diary.changed() == [0, 1, 3, 4, 5]
    check_counters(runner, diary)
    (told,) = [t for t in texts if t.startswith('Iteration')]
    assert told.endswith('or clip gradients with clip_grad.')


def test_checkpoints_are_those_of_the_parent():
    model = nn.Linear(2, 1)

    def wrapped(cls):
        return cls(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    ours, parents = wrapped(EquilibriumOptimWrapper), wrapped(OptimWrapper)
    ours.update_params(model(torch.ones(1, 2)).sum())
    parents.load_state_dict(ours.state_dict())
    again = wrapped(EquilibriumOptimWrapper)
    again.load_state_dict(parents.state_dict())
    first, second = (
        w.optimizer.state[model.weight]['momentum_buffer'] for w in (ours, again)
    )
    assert first.tolist() == second.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    'options, error, said',
    [
        (dict(policy='halt'), ValueError, "policy='halt' is unknown: use one of "),
        (dict(limit=0), ValueError, 'limit=0 fails every sample: use a number'),
        (dict(limit=-1.0), ValueError, 'limit=-1.0 is out of range: use a number'),
        (dict(limit=NAN), ValueError, 'limit=nan is out of range: use a number'),
        (dict(limit='1'), TypeError, "limit must be a number, got '1'"),
        (dict(max_skips=-1), ValueError, 'max_skips=-1 is too small: use 0 or more'),
        (dict(window=0), ValueError, 'window=0 is too small: use 1 or more'),
        (dict(warn_interval=0), ValueError, 'warn_interval=0 is too small: use 1'),
        (dict(max_skips=5, window=5), ValueError, 'max_skips=5 cannot be exceeded am'),
    ],
)
def test_refuses(options, error, said):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(error) as caught:
        EquilibriumOptimWrapper(optimizer, **options)
    assert str(caught.value).startswith(f'EquilibriumOptimWrapper.{said}')


SCRIPT = """
import sys
from tests.test_engine.test_optim_wrappers.conftest import forward_status, training
runner, _ = training(sys.argv[1], forward_status(), [1], policy='stop')
runner.train()
"""


@pytest.mark.slow
def test_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert 'EquilibriumFailure: The training ends at iteration 2: failed solves' in last
    assert (tmp_path / 'stopped_iter_2.pth').exists()
    assert (tmp_path / 'failure_report.json').exists()
