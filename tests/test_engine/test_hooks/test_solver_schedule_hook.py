import pytest

from mdeq_mm.engine import SolverScheduleHook
from tests.helpers import logged

from .conftest import watched

BY_ITER = dict(by_epoch=False, max_iters=6, val_interval=2)


def hook(*milestones, **options):
    return dict(type='SolverScheduleHook', milestones=list(milestones), **options)


def steps(found):
    return {when: evaluations for when, (_, evaluations) in found}


MILESTONES = (
    dict(begin=1, solver=dict(max_steps=2, tol=0.0)),
    dict(begin=2, solver=dict(max_steps=4), gradient=dict(max_steps=3)),
)


def test_by_epoch(make_runner):
    """Six evaluations as configured, then two, then four; validation as configured."""
    runner = make_runner([hook(*MILESTONES)])
    with logged() as texts:
        runner.train()
    watch = watched(runner)
    assert steps(watch.train) == {0: 6, 1: 6, 2: 2, 3: 2, 4: 4, 5: 4}
    assert steps(watch.val)[4] == 6
    told = [t for t in texts if t.startswith('From epoch')]
    assert told == [
        "From epoch 1 on: solver {'max_steps': 2, 'tol': 0.0}.",
        "From epoch 2 on: solver {'max_steps': 4}, gradient {'max_steps': 3}.",
    ]
    layer = runner.model.backbone.equilibrium
    # What the second milestone does not name stays as the first set it.
    assert (layer.solver.max_steps, layer.solver.tol) == (4, 0)
    assert layer.last_solution is not None
    assert layer.gradient.solver.max_steps == 3
    assert (layer.eval_solver.max_steps, layer.eval_solver.tol) == (6, 1e-3)


def test_by_iteration(make_runner):
    milestones = [dict(begin=0, solver=dict(max_steps=3, tol=0.0)),
                  dict(begin=4, solver=dict(max_steps=5))]  # fmt: skip
    runner = make_runner([hook(*milestones, by_epoch=False)], BY_ITER)
    runner.train()
    assert steps(watched(runner).train) == {0: 3, 1: 3, 2: 3, 3: 3, 4: 5, 5: 5}


SHARES = (
    dict(begin=0.0, solver=dict(max_steps=3, tol=0.0)),
    dict(begin=0.5, solver=dict(max_steps=5)),
)


def test_shares_of_the_iterations(make_runner):
    runner = make_runner([hook(*SHARES, by_epoch=False)], BY_ITER)
    with logged() as texts:
        runner.train()
    assert steps(watched(runner).train) == {0: 3, 1: 3, 2: 3, 3: 5, 4: 5, 5: 5}
    assert "From iteration 3 on: solver {'max_steps': 5}." in texts


@pytest.mark.parametrize(('epochs', 'begin'), [(2, 1), (4, 2)])
def test_shares_of_the_epochs(make_runner, epochs, begin):
    cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=9)
    runner = make_runner([hook(*SHARES)], cfg)
    runner.train()
    assert steps(watched(runner).train) == {
        i: 5 if i >= 2 * begin else 3 for i in range(2 * epochs)
    }


def test_shares_and_epochs_side_by_side(make_runner):
    mixed = [SHARES[0], dict(begin=1, solver=dict(max_steps=4)),
             dict(begin=0.67, solver=dict(max_steps=5))]  # fmt: skip
    runner = make_runner([hook(*mixed)])
    runner.train()
    assert steps(watched(runner).train) == {0: 3, 1: 3, 2: 4, 3: 4, 4: 5, 5: 5}


def test_shares_that_fall_on_one_epoch_are_refused(make_runner):
    mixed = [dict(begin=2, solver=dict(max_steps=4)),
             dict(begin=0.6, solver=dict(max_steps=5))]  # fmt: skip
    runner = make_runner([hook(*mixed)])
    with pytest.raises(ValueError, match=r'begin at \[2, 2\]: give them in ascending'):
        runner.train()


def test_a_resumed_training_goes_on_with_what_applies(make_runner, resumable, tmp_path):
    make_runner([hook(*MILESTONES)]).train()
    runner = make_runner(
        [hook(*MILESTONES)],
        dict(by_epoch=True, max_epochs=4, val_interval=1),
        resume=True,
    )
    runner.train()
    assert steps(watched(runner).train) == {6: 4, 7: 4}
    layer = runner.model.backbone.equilibrium
    assert (layer.solver.tol, layer.gradient.solver.max_steps) == (0, 3)


def test_epochs_in_a_loop_over_iterations_are_refused(make_runner):
    runner = make_runner([hook(*MILESTONES)], BY_ITER)
    with pytest.raises(ValueError, match='by_epoch=True has no meaning'):
        runner.train()


def test_a_gradient_without_solver_is_refused(make_runner):
    runner = make_runner([hook(*MILESTONES)])
    from mdeq_mm.implicit import PhantomGradient

    runner.model.backbone.equilibrium.gradient = PhantomGradient(2)
    with pytest.raises(ValueError, match='PhantomGradient has no solver: leave it out'):
        runner.train()


@pytest.mark.parametrize(
    ('milestones', 'error', 'words'),
    [
        ([], TypeError, 'milestones must be a list of dicts'),
        ([3], TypeError, r'milestones\[0\] must be a dict with begin'),
        ([dict(solver=dict())], TypeError, r'milestones\[0\] .*begin'),
        ([dict(begin=-1)], ValueError, r'milestones\[0\]\.begin=-1 is too small'),
        ([dict(begin=0, solve=dict())], ValueError, "unknown key 'solve'"),
        ([dict(begin=0, solver=dict(steps=3))], ValueError, "unknown key 'steps'"),
        ([dict(begin=0, solver=dict(max_steps=0))], ValueError, 'max_steps=0'),
        ([dict(begin=0, gradient=dict(tol=-1))], ValueError, r'gradient\.tol=-1'),
        ([dict(begin=5), dict(begin=2)], ValueError, r'begin at \[5, 2\]'),
        ([dict(begin=0.5), dict(begin=0.2)], ValueError, r'begin at \[0.5, 0.2\]'),
        ([dict(begin=1.5)], ValueError, r'\[0\]\.begin=1.5 .*share.*0.0 to 1.0'),
        ([dict(begin=-0.5)], ValueError, r'\[0\]\.begin=-0.5 .*use 0.0 to 1.0'),
        ([dict(begin='1')], TypeError, r"\[0\]\.begin must be an integer, got '1'"),
    ],
    ids=str,
)
def test_bad_milestones_are_refused(milestones, error, words):
    with pytest.raises(error, match=words):
        SolverScheduleHook(milestones)
