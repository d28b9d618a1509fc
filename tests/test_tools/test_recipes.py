"""The recipes, shortened: they train, go on where they were, test and compare."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from tests.helpers import load_tool
from tests.image_folders import write_class_folder
from tests.test_configs.test_camvid_configs import write_camvid

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
# The schedule of CIFAR-10 in two iterations.
TWO = [
    'train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'param_scheduler.T_max=2',
    'default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=1',
    'train_dataloader.batch_size=4', 'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
]  # fmt: skip
CAMVID = [
    'train_cfg.max_iters=2', 'train_cfg.val_interval=1', 'param_scheduler.0.end=1',
    'param_scheduler.1.begin=1', 'param_scheduler.1.T_max=1', 'param_scheduler.1.end=2',
    'default_hooks.checkpoint.interval=1', 'default_hooks.logger.interval=1',
    'model.data_preprocessor.size=(64,64)',
    'train_dataloader.dataset.pipeline.2.scale=(96,72)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(96,72)',
    'test_dataloader.dataset.pipeline.1.scale=(96,72)',
]  # fmt: skip


def call(name, *args):
    command = [sys.executable, f'tools/recipes/{name}.py', *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope='module')
def recipe():
    """The module that recipes share."""
    return load_tool('tools/recipes/recipe.py')


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cifar10(tmp_path):
    data = tmp_path / 'cifar10'
    write_class_folder(data, CLASSES, dict(train=4, test=2), size=32)
    out = tmp_path / 'out'
    args = ['--data-root', data, '--work-dir', out]
    # One after the other: the second finds the result of the first.
    for model in ('MDEQ-tiny', 'ResNet-18'):
        done = call('cifar10', *args, '--only', model, '--cfg-options', *TWO)
        assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / 'results.json').read_text())
    assert list(results) == ['MDEQ-tiny', 'ResNet-18']
    parameters = {label: r['parameters'] for label, r in results.items()}
    assert parameters == {'MDEQ-tiny': 160_538, 'ResNet-18': 11_173_962}
    for label, result in results.items():
        assert result['iterations'] == 2 and len(result['losses']) == 2
        assert 0 <= result['test accuracy, %'] <= 100
        assert result['checkpoint'] == 'iter_2.pth'
        logged = [json.loads(line) for line in Path(result['log']).open()]
        assert [e.get('iter') for e in logged] == [1, 2, None]
        assert logged[-1]['accuracy/top1'] == result['test accuracy, %']
        assert (
            f'| {label} | {parameters[label] / 1e6:.2f} |'
            in (out / 'results.md').read_text()
        )
        # The command that made it, to be run again.
        assert result['command'].startswith('python tools/train.py configs/cifar10/')
    assert matplotlib.image.imread(out / 'curves.png').std() > 0.05

    # A second call trains nothing, and tells the same.
    checkpoint = out / 'mdeq-tiny' / 'iter_2.pth'
    before = checkpoint.stat().st_mtime_ns
    both = ['--only', 'ResNet-18', 'MDEQ-tiny']
    done = call('cifar10', *args, *both, '--cfg-options', *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkpoint.stat().st_mtime_ns == before
    again = json.loads((out / 'results.json').read_text())
    for label, result in results.items():
        assert again[label]['losses'] == result['losses']
        assert again[label]['test accuracy, %'] == result['test accuracy, %']


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_camvid(tmp_path):
    """The checkpoint that is best on the validation images is tested."""
    data = write_camvid(tmp_path / 'camvid', size=(96, 72))
    out = tmp_path / 'out'
    done = call(
        'camvid', '--data-root', data, '--work-dir', out, '--cfg-options', *CAMVID
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / 'results.json').read_text())
    assert list(results) == ['MDEQ', 'HRNet-W18s']
    for label, result in results.items():
        assert result['checkpoint'].startswith('best_mIoU_iter_')
        tested = (
            out / label.lower() / 'test' / f'{Path(result["checkpoint"]).stem}.json'
        )
        found = json.loads(tested.read_text())
        assert result['test mIoU, %'] == found['mIoU']
        logged = [json.loads(line) for line in Path(result['log']).open()]
        step = int(tested.stem.rpartition('_')[2])
        assert logged[-1].pop('step') == step
        assert logged[-1] == {f'test/{key}': value for key, value in found.items()}
        assert [e['step'] for e in logged[:-1] if 'mIoU' in e] == [1, 2]
        assert [step for step, _ in result['curve']] == [1, 2]


def test_what_later_runs_logged_wins(recipe, tmp_path):
    lines = {
        'a': [(10, 2.0, 0.5), (20, 1.5, 0.5), (30, 9.0, 9.0)],
        'b': [(30, 1.0, 0.25), (40, 0.5, 0.25)],
    }
    for name, entries in lines.items():
        path = tmp_path / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        texts = [
            json.dumps(dict(loss=loss, time=time, iter=step, step=step))
            for step, loss, time in entries
        ]
        texts.append(json.dumps({'accuracy/top1': 50.0 + len(name), 'step': 40}))
        path.write_text('\n'.join(texts))
    steps, values = recipe.read_log(tmp_path, 'accuracy/top1')
    assert steps == [(10, 5.0, 2.0), (20, 5.0, 1.5), (30, 2.5, 1.0), (40, 2.5, 0.5)]
    assert values == [(40, 51.0)]


def test_models_that_are_not_there(tmp_path):
    done = call('cifar10', '--only', 'ResNet-34', '--work-dir', tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        '--only: there is no ResNet-34; use MDEQ-tiny, MDEQ-large, ResNet-18'
    )


def test_data_that_is_not_there(tmp_path):
    data = tmp_path / 'nowhere'
    done = call('camvid', '--data-root', data, '--work-dir', tmp_path / 'out')
    assert done.returncode == 1
    assert f'{data} is not there: give the archive of CamVid' in done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_training_that_fails_ends_the_recipe(tmp_path):
    data = tmp_path / 'cifar10'
    write_class_folder(data, CLASSES, dict(train=1, test=1), size=32)
    done = call(
        'cifar10', '--data-root', data, '--work-dir', tmp_path / 'out',
        '--cfg-options', 'train_cfg.max_iters=0',
    )  # fmt: skip
    assert done.returncode == 1
    assert 'MDEQ-tiny: "python tools/train.py' in done.stderr
    assert 'goes on from the last checkpoint' in done.stderr
