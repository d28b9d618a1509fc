"""Trainings that are killed and resumed end like those that were not."""

import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner

from mdeq_mm.checkpoints import read_checkpoint
from mdeq_mm.resume import ExactResumeHook
from tests import killed_training as training
from tests.helpers import logged
from tests.image_folders import write_class_folder

SETTINGS = {
    'epochs': dict(by_epoch=True),
    'iterations': dict(by_epoch=False),
    'workers': dict(by_epoch=True, workers=2),
    'iterations, workers': dict(by_epoch=False, workers=2),
    # Checkpoints in the middle of epochs, of which each has 6 iterations.
    'within epochs': {
        'by_epoch': True,
        'default_hooks.checkpoint.by_epoch': False,
        'default_hooks.checkpoint.interval': 4,
    },
    # Each training draws a seed, which those that resume it have to take over.
    'no seed': {'by_epoch': False, 'randomness.seed': None},
}


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits')
    classes = [str(i) for i in range(10)]
    return write_class_folder(root, classes, dict(train=22, test=10), size=32)


@pytest.fixture(scope='module')
def unbroken(data_root, tmp_path_factory):
    """Contents of the last checkpoint of a training without a break, and its time."""
    done = {}

    def find(name):
        if name not in done:
            work_dir = tmp_path_factory.mktemp('unbroken') / 'run'
            begin = time.monotonic()
            end(training.start(data_root, work_dir, **SETTINGS[name]), work_dir)
            done[name] = last(work_dir), time.monotonic() - begin
        return done[name]

    return find


def end(process, work_dir):
    process.join()
    errors = work_dir.with_name(f'{work_dir.name}.err').read_text()
    assert process.exitcode == 0, errors[-2000:]


def last(work_dir):
    (path,) = {*work_dir.glob('epoch_4.pth'), *work_dir.glob('iter_24.pth')}
    return training.contents(path)


def differences(found, expected):
    """Names of what is not bit for bit the same."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if not (
            torch.equal(found[name], value)
            if isinstance(value, torch.Tensor)
            else found[name] == value
        )
    ]


def kill_at_random(name, seed, kills, data_root, work_dir, duration):
    """Kill a training, resume it, kill that, and so on; then let it end."""
    moments = random.Random(seed)
    for n in range(kills):
        process = training.start(data_root, work_dir, resume=n > 0, **SETTINGS[name])
        process.join(moments.uniform(0, duration))
        process.kill()
        process.join()
    end(training.start(data_root, work_dir, resume=True, **SETTINGS[name]), work_dir)


@pytest.mark.parametrize(
    ('name', 'kills'),
    [('epochs', 2), pytest.param('iterations', 3, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments(name, kills, data_root, tmp_path, unbroken):
    expected, duration = unbroken(name)
    kill_at_random(name, 1, kills, data_root, tmp_path / 'run', duration)
    assert differences(last(tmp_path / 'run'), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(2, 5))
@pytest.mark.parametrize('name', [n for n in SETTINGS if n != 'no seed'])
def test_killed_at_many_random_moments(name, seed, data_root, tmp_path, unbroken):
    """Fifteen trainings, 45 kills."""
    expected, duration = unbroken(name)
    kill_at_random(name, seed, 3, data_root, tmp_path / 'run', duration)
    assert differences(last(tmp_path / 'run'), expected) == []


@pytest.mark.parametrize(
    ('point', 'passed'),
    [('half written', 0), ('pointer emptied', 2)]
    + [
        pytest.param(point, passed, marks=pytest.mark.slow)
        for point in training.POINTS
        # Each checkpoint is followed by the name of the last whole one.
        for passed in (1, 2, 4)
    ],
)
def test_killed_while_a_checkpoint_is_written(
    point, passed, data_root, tmp_path, unbroken
):
    expected, _ = unbroken('epochs')
    work_dir = tmp_path / 'run'
    process = training.start(data_root, work_dir, kill_at=(point, passed))
    process.join()
    assert process.exitcode == -9
    left = {path.name for path in work_dir.iterdir()}
    assert any(name.endswith('.partial') for name in left) == (
        point in ('half written', 'before renaming')
    )
    end(training.start(data_root, work_dir, resume=True), work_dir)
    assert differences(last(work_dir), expected) == []
    # What is left is what CheckpointHook was told to keep, or did not get to remove.
    assert not list(work_dir.glob('*.partial'))


@pytest.mark.slow
def test_killed_with_one_file_that_is_written_again_and_again(
    data_root, tmp_path, unbroken
):
    """In a folder of its own, under a name without a number."""
    expected, _ = unbroken('epochs')
    work_dir, out_dir = tmp_path / 'run', tmp_path / 'files'
    options = {
        'default_hooks.checkpoint.out_dir': str(out_dir),
        'default_hooks.checkpoint.filename_tmpl': 'latest.pth',
    }
    for kill_at in (('pointer emptied', 2), ('half written', 1), ('half written', 3)):
        resume = work_dir.exists()
        process = training.start(data_root, work_dir, resume, kill_at, **options)
        process.join()
        assert process.exitcode == -9
    end(training.start(data_root, work_dir, resume=True, **options), work_dir)
    assert (
        differences(training.contents(out_dir / 'run' / 'latest.pth'), expected) == []
    )


@pytest.mark.slow
def test_another_batch_size_loses_no_data(runner):
    """A training that is resumed with other epochs begins them at their begin."""
    first = runner(**{'train_cfg.max_epochs': 2})
    first.train()
    resumed = {'load_from': f'{first.work_dir}/epoch_2.pth', 'resume': True}
    second = runner(
        **{'train_cfg.max_epochs': 3, 'train_dataloader.batch_size': 11}, **resumed
    )
    second.train()
    # Twelve iterations of up to 4 images, and two of 11.
    assert second.iter == 14

    within = {
        'train_cfg.max_epochs': 1,
        'default_hooks.checkpoint.by_epoch': False,
        'default_hooks.checkpoint.interval': 4,
        'default_hooks.checkpoint.max_keep_ckpts': -1,
    }
    first = runner(**within)
    first.train()
    resumed = {'load_from': f'{first.work_dir}/iter_4.pth', 'resume': True}
    second = runner(**within, **resumed, **{'train_dataloader.batch_size': 11})
    with logged() as texts:
        second.train()
    assert second.iter == 6
    assert any('2 batches now and had 6' in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['workers', 'within epochs', 'iterations, workers'])
def test_workers_and_place_of_checkpoints_do_not_matter(name, unbroken):
    """Neither who loads the data nor how often it is saved changes a result."""
    plain = 'iterations' if name.startswith('iterations') else 'epochs'
    expected, found = unbroken(plain)[0], unbroken(name)[0]
    if name == 'within epochs':
        # Each checkpoint lets warm starts begin anew.
        assert found.keys() == expected.keys()
    else:
        assert differences(found, expected) == []


@pytest.mark.slow
def test_a_seed_that_was_drawn_is_kept(data_root, tmp_path):
    """Data and dropout go on with the seed of the first part."""
    work_dir = tmp_path / 'run'
    options = SETTINGS['no seed'] | {'train_cfg.max_iters': 3}
    end(training.start(data_root, work_dir, **options), work_dir)
    first = read_checkpoint(str(work_dir / 'iter_3.pth'))
    end(training.start(data_root, work_dir, True, **SETTINGS['no seed']), work_dir)
    whole = tmp_path / 'whole'
    options = {'by_epoch': False, 'randomness.seed': first['meta']['seed']}
    end(training.start(data_root, whole, **options), whole)
    assert differences(last(work_dir), last(whole)) == []


def test_without_the_hook_a_resumed_training_ends_elsewhere(
    data_root, tmp_path, unbroken
):
    """What the other tests compare does depend on what the hook does."""
    work_dir = tmp_path / 'run'
    bare = {
        'by_epoch': True,
        'exact': False,
        'default_hooks.checkpoint.max_keep_ckpts': -1,
    }
    end(training.start(data_root, work_dir, **bare), work_dir)
    expected = last(work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_2.pth'))
    end(training.start(data_root, work_dir, resume=True, **bare), work_dir)
    names = differences(last(work_dir), expected)
    assert any(name.startswith('.state_dict') for name in names)


@pytest.mark.slow
def test_two_processes(data_root, tmp_path):
    """Each has its own randomness, and its own share of the data."""

    def train(name, **options):
        work_dir = tmp_path / name
        ranks = [
            training.start(data_root, work_dir, rank=rank, **options) for rank in (0, 1)
        ]
        for process in ranks:
            end(process, work_dir)

    train('whole')
    expected = training.contents(tmp_path / 'whole' / 'epoch_4.pth')
    train('run', **{'train_cfg.max_epochs': 2})
    train('run', resume=True)
    found = training.contents(tmp_path / 'run' / 'epoch_4.pth')
    assert differences(found, expected) == []


@pytest.fixture
def runner(data_root, tmp_path):
    """A runner of the same training in this process, which builds by options."""

    def build(**options):
        name = f'r{len(list(tmp_path.iterdir()))}'
        options = {'visualizer.name': f'{tmp_path.name}-{name}'} | options
        cfg = training.config(data_root, tmp_path / name, **options)
        cfg.experiment_name = options['visualizer.name']
        return Runner.from_cfg(cfg)

    return build


def test_a_missed_validation_is_made_up_for(runner, tmp_path):
    """Before training goes on, once, with what follows from its results."""
    schedule = dict(
        type='ReduceOnPlateauLR', monitor='accuracy/top1', rule='greater', patience=0,
        factor=0.5, by_epoch=True,
    )  # fmt: skip
    options = {
        'train_cfg.max_epochs': 3,
        'default_hooks.checkpoint.save_best': None,
        'default_hooks.checkpoint.max_keep_ckpts': -1,
        'param_scheduler': [schedule],
    }
    whole = runner(**options)
    whole.train()
    # Written before the validation of its epoch, as when a kill came between them.
    second = Path(whole.work_dir) / 'epoch_2.pth'
    resumed = runner(**options, load_from=str(second), resume=True)
    with logged() as texts:
        resumed.train()
    assert sum('made up for' in text for text in texts) == 1
    expected = training.contents(f'{whole.work_dir}/epoch_3.pth')
    assert (
        differences(training.contents(f'{resumed.work_dir}/epoch_3.pth'), expected)
        == []
    )
    # Which the missed validation had a part in.
    rate = '.param_schedulers.0._last_value.0'
    assert training.contents(second)[rate] > expected[rate]


def test_dropped_steps_are_counted_on(runner):
    first = runner(**{'train_cfg.max_epochs': 1})
    first.optim_wrapper = first.build_optim_wrapper(first.optim_wrapper)
    first.optim_wrapper.skipped = 3
    first.optim_wrapper._history.extend([True, False])
    first.train()
    options = {'load_from': f'{first.work_dir}/epoch_1.pth', 'resume': True}
    second = runner(**{'train_cfg.max_epochs': 1}, **options)
    second.train()
    assert second.optim_wrapper.skipped == 3
    # Those of before, and the six steps of the epoch.
    assert list(second.optim_wrapper._history) == [True] + [False] * 7


def test_warns_of_gradients_that_a_checkpoint_lacks(runner):
    options = {
        'by_epoch': False,
        'train_cfg.max_iters': 6,
        'optim_wrapper.accumulative_counts': 2,
    }
    built = runner(**options)
    with logged() as texts:
        built.train()
    found = [text for text in texts if 'accumulated' in text]
    # After the third iteration, not after the sixth.
    assert len(found) == 1 and 'iteration 3 lacks the gradients of 1 ' in found[0]


def test_refuses_other_loops():
    other = SimpleNamespace(train_loop=SimpleNamespace(), iter=0)
    said = r'train_cfg\.type=SimpleNamespace.*remove the hook'
    with pytest.raises(TypeError, match=said):
        ExactResumeHook().before_train(other)


def test_says_that_a_checkpoint_is_not_its_own(runner):
    first = runner(**{'train_cfg.max_epochs': 1}, exact=False)
    first.train()
    options = {'load_from': f'{first.work_dir}/epoch_1.pth', 'resume': True}
    second = runner(**{'train_cfg.max_epochs': 2}, **options)
    with logged() as texts:
        second.train()
    assert not any('made up for' in text for text in texts)
    assert any('written without ExactResumeHook' in text for text in texts)
