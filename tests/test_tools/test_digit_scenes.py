"""tools/dataset_converters/digit_scenes.py, and the config that trains on it."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers import load_tool

ROOT = Path(__file__).resolve().parents[2]
FEW = dict(train=6, test=4)


@pytest.fixture(scope='module')
def tool():
    return load_tool('tools/dataset_converters/digit_scenes.py')


@pytest.fixture(scope='module')
def folder(tool, tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'digit_scenes'
    assert tool.write_scenes(root, FEW)
    return root


def pixels(root):
    return {
        path.relative_to(root).as_posix(): cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for path in sorted(root.rglob('*.png'))
    }


def of_split(tool, split, count):
    """Images, labels and numbers of digits of the first scenes of a split."""
    digits, parts = tool.split_digits()
    for number in range(count):
        rng = tool.generator(split, number)
        yield digits, parts, *tool.compose(digits, parts[split], rng)


def test_every_run_writes_the_same(tool, folder, tmp_path):
    more = tmp_path / 'more'
    assert tool.write_scenes(more, dict(train=7, test=4))
    found, again = pixels(folder), pixels(more)
    assert len(found) == 20 and len(again) == 22
    for name, image in found.items():
        assert image.shape == (64, 64) and image.dtype == np.uint8
        # A scene does not depend on how many there are.
        np.testing.assert_array_equal(image, again[name])
    images = [i.tobytes() for name, i in found.items() if name.startswith('images')]
    assert len(set(images)) == 10


def test_no_digit_is_shared_between_the_splits(tool):
    shown = {
        split: {n for *_, numbers in of_split(tool, split, 60) for n in numbers}
        for split in FEW
    }
    assert not shown['train'] & shown['test']
    _, parts = tool.split_digits()
    assert len(parts['test']) == 599
    for split, numbers in shown.items():
        assert len(numbers) > 100
        assert numbers <= set(parts[split].tolist())


def test_labels_lie_on_the_strokes(tool, monkeypatch):
    """Without texture and noise, a pixel differs from the ground by its ink."""
    monkeypatch.setattr(tool, 'ground', lambda rng: np.full((64, 64), 0.5))
    monkeypatch.setattr(tool, 'NOISE', 0)
    monkeypatch.setattr(tool, 'CONTRAST', (0.4, 0.4))
    for digits, _, image, labels, shown in of_split(tool, 'test', 20):
        ink = np.abs(image / 255 - 0.5) / 0.4
        drawn = labels > 0
        assert ink[drawn].min() >= 0.49
        assert ink[~drawn].max() <= 0.51
        classes = set(np.unique(labels).tolist()) - {0}
        assert classes == {int(digits.target[n]) + 1 for n in shown}


def test_thresholds_do_not_find_the_strokes(tool):
    """Not even the best one for each scene, chosen with the truth at hand."""
    scores = []
    for _, _, image, labels, _ in of_split(tool, 'test', 20):
        drawn = labels > 0
        cuts = [image > t for t in range(0, 256, 8)]
        scores.append(
            max(
                (found & drawn).sum() / (found | drawn).sum()
                for cut in cuts
                for found in (cut, ~cut)
            )
        )
    assert np.mean(scores) < 0.7


def test_a_folder_with_something_else_is_left_alone(tool, folder, tmp_path):
    assert not tool.write_scenes(folder, FEW)
    with pytest.raises(FileExistsError, match='20 of 22 files and 0 others'):
        tool.write_scenes(folder, dict(train=7, test=4))
    (tmp_path / 'mine.txt').write_text('keep')
    with pytest.raises(FileExistsError, match='0 of 20 files and 1 others'):
        tool.write_scenes(tmp_path, FEW)
    assert (tmp_path / 'mine.txt').read_text() == 'keep'


def test_an_interrupted_run_leaves_nothing(tool, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, 'compose', fail)
    with pytest.raises(KeyboardInterrupt):
        tool.write_scenes(tmp_path / 'data' / 'scenes', FEW)
    assert list((tmp_path / 'data').iterdir()) == []


def test_config_trains_and_evaluates(folder, tmp_path):
    command = [
        sys.executable, 'tools/train.py',
        'configs/demo/mdeq_1xb16-12e_digit-scenes-64x64.py',
        '--work-dir', tmp_path, '--data-root', folder,
        '--cfg-options', 'train_dataloader.batch_size=3',
        'train_cfg.max_epochs=1', 'param_scheduler.0.end=1', 'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
    ]  # fmt: skip
    done = subprocess.run(
        [str(c) for c in command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    losses = [e['decode.loss_ce'] for e in entries if 'decode.loss_ce' in e]
    assert len(losses) == 2
    # The head starts with no preference among the eleven labels.
    assert losses[0] == pytest.approx(np.log(11), abs=0.1)
    assert 0 <= entries[-1]['mIoU'] <= 100
    assert (tmp_path / 'epoch_1.pth').is_file()
