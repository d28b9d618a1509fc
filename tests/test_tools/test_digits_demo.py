"""The main job, shortened: the data, three epochs of each model, the reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits

from mdeq_mm.analysis.saved_bytes import saved_bytes, saved_bytes_per_image
from tests.helpers import load_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def digits_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'digits'
    assert load_tool('tools/dataset_converters/digits.py').write_digits(root)
    return root


def test_digits_are_written_whole_and_split_once(digits_folder):
    tool = load_tool('tools/dataset_converters/digits.py')
    files = {p.stem: p for p in digits_folder.glob('*/*/*.png')}
    digits = load_digits()
    assert len(files) == len(digits.images) == 1797
    for number in (0, 731, 1796):
        path = files[f'{number:04d}']
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        expected = np.round(digits.images[number] * 255 / 16)
        np.testing.assert_array_equal(image, expected)
        assert path.parent.name == str(digits.target[number])
    test = list(digits_folder.glob('test/*/*.png'))
    assert len(test) == 599
    for digit in range(10):
        share = len([p for p in test if p.parent.name == str(digit)])
        assert share == pytest.approx((digits.target == digit).sum() / 3, abs=1)
    # A second call leaves everything in place.
    assert not tool.write_digits(digits_folder)


def test_digits_do_not_touch_a_folder_with_something_else(tmp_path):
    (tmp_path / 'mine.txt').write_text('keep')
    with pytest.raises(FileExistsError, match='0 images of 1797'):
        load_tool('tools/dataset_converters/digits.py').write_digits(tmp_path)
    assert (tmp_path / 'mine.txt').read_text() == 'keep'


def test_the_split_is_the_same_everywhere(digits_folder):
    numbers = sorted(int(p.stem) for p in digits_folder.glob('test/0/*.png'))
    assert numbers[:5] == FIRST_TEST_ZEROS


FIRST_TEST_ZEROS = [10, 78, 101, 166, 202]


@pytest.mark.timeout(900)
def test_demo_trains_and_reports_everything(digits_folder, tmp_path):
    scenes = tmp_path / 'data' / 'digit_scenes'
    command = [
        sys.executable, 'tools/demo/digits_demo.py',
        '--work-dir', tmp_path, '--data-root', digits_folder,
        '--scenes-root', scenes, '--num-scenes', '48', '12',
        '--cfg-options', 'train_cfg.max_epochs=3', 'train_cfg.val_interval=1',
        'param_scheduler.0.end=1', 'default_hooks.logger.interval=3',
    ]  # fmt: skip
    command = [str(c) for c in command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Progress is visible where there is no terminal, too.
    assert done.stdout.count('epoch 3: test accuracy') == 3
    assert done.stdout.count('epoch 3: test mIoU') == 2
    # They start cold.
    assert 'Training unrolled' not in done.stdout
    assert '60 scenes of digits' in done.stdout
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {task: list(models) for task, models in results.items()} == dict(
        digits=['MDEQ', 'ResNet', 'HRNet'], scenes=['MDEQ', 'HRNet']
    )
    check_digits(results['digits'], done.stdout)
    check_scenes(results['scenes'], done.stdout)
    text = (tmp_path / 'results.md').read_text()
    assert text.count('| MDEQ |') == 2
    for name in ('curves.png', 'predictions.png', 'segmentation.png'):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.std() > 0.05


def check_digits(results, shown):
    mdeq, resnet, hrnet = results.values()
    assert mdeq['parameters'] == 95_986 <= 120_000
    for peer in (resnet, hrnet):
        assert peer['parameters'] == pytest.approx(mdeq['parameters'], rel=0.15)
        assert peer['evaluations of f, mean'] is None
    assert resnet['training time / ResNet'] == 1
    assert mdeq['training time / ResNet'] > 1
    # Guessing is right in 10 % of the cases.
    assert all(r['test accuracy, %'] > 30 for r in results.values())
    assert 2 < mdeq['evaluations of f, mean'] <= 30
    # The accuracy in the table is the one that the training ended with.
    last = shown.split('ResNet: ')[1].split('epoch 3: test accuracy ')[1]
    assert resnet['test accuracy, %'] == pytest.approx(float(last.split()[0]), abs=0.06)


def check_scenes(results, shown):
    mdeq, hrnet = results.values()
    assert mdeq['parameters'] <= 200_000
    assert hrnet['parameters'] == pytest.approx(mdeq['parameters'], rel=0.15)
    assert 2 < mdeq['evaluations of f, mean'] <= 30
    assert hrnet['evaluations of f, mean'] is None
    assert hrnet['training time / HRNet'] == 1
    for result in results.values():
        assert 0 < result['mIoU, %'] < result['pixel accuracy, %'] <= 100
    # The mIoU in the table is the one that the training ended with.
    last = shown.split('HRNet: ')[-1].split('epoch 3: test mIoU ')[1]
    assert hrnet['mIoU, %'] == pytest.approx(float(last.split()[0]), abs=0.06)


def test_the_mean_iou_of_known_maps():
    """Class 0 shares 3 of 5 pixels, class 1 1 of 3; class 2 is nowhere."""
    sys.path.insert(0, str(ROOT / 'tools' / 'demo'))
    try:
        report = load_tool('tools/demo/scenes_report.py')
    finally:
        sys.path.pop(0)
    truth = torch.tensor([[0, 0, 0], [1, 1, 0]], dtype=torch.uint8)
    guess = torch.tensor([[0, 0, 1], [1, 0, 0]])
    assert report.mean_iou([guess], [truth], 3) == pytest.approx((3 / 5 + 1 / 3) / 2)


def test_demo_ends_with_the_log_where_a_training_fails(digits_folder, tmp_path):
    command = [sys.executable, 'tools/demo/digits_demo.py', '--work-dir', str(tmp_path)]
    command += ['--data-root', str(digits_folder)]
    command += ['--scenes-root', str(tmp_path / 'scenes'), '--num-scenes', '1', '1']
    command += ['--cfg-options', 'model.backbone.solver.tol=-1']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'tol=-1' in done.stdout
    assert 'MDEQ: the training failed' in done.stderr


def test_saved_bytes_of_a_known_graph():
    x = torch.rand(3, 10, requires_grad=True)
    w = torch.rand(10, 5, requires_grad=True)
    # A product keeps both factors, a hyperbolic tangent its result.
    assert saved_bytes(lambda: (x @ w).tanh()) == 4 * (30 + 50 + 15)
    # Each storage counts once.
    assert saved_bytes(lambda: (x @ w, x @ w)) == 4 * (30 + 50)
    per_image = saved_bytes_per_image(
        lambda n: (torch.rand(n, 10, requires_grad=True) @ w).tanh()
    )
    assert per_image == 4 * (10 + 5)


@pytest.mark.parametrize(
    ('load', 'given', 'expected'),
    [(0.1, None, None), (1.2, None, '3'), (9.0, None, '1'), (9.0, '2', '2')],
)
def test_busy_cores_are_left_alone(monkeypatch, load, given, expected):
    demo = load_tool('tools/demo/digits_demo.py')
    monkeypatch.setattr(os, 'cpu_count', lambda: 4)
    monkeypatch.setattr(os, 'getloadavg', lambda: (load, load, load))
    # Once set, so that what the demo sets is taken back.
    monkeypatch.setenv('OMP_NUM_THREADS', given or '4')
    if given is None:
        monkeypatch.delenv('OMP_NUM_THREADS')
    console = Console(record=True, soft_wrap=True)
    demo.limit_threads(console)
    assert os.environ.get('OMP_NUM_THREADS') == expected
    said = console.export_text()
    assert ('takes' in said) == (given is None and expected is not None)
