"""tools/analysis_tools: what they draw, count and print, and what they refuse."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

pytest.importorskip('mmseg', reason='mmseg is not installed')

from mdeq_mm.apis.anytime import Snapshot
from mdeq_mm.apis.inference import load_model
from tests.helpers import load_tool
from tests.test_tools.test_train_test import write_mmseg_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'
RESNET = ROOT / 'configs/cifar10/resnet50_2xb64-50e_cifar10.py'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return write_mmseg_config(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def checkpoint(config):
    """Random weights, with the meta data that a Runner saves."""
    torch.manual_seed(0)
    model = load_model(Config.fromfile(config), device='cpu')
    path = config.parent / 'random.pth'
    meta = dict(dataset_meta=dict(classes=('dark', 'bright'), palette=None))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def image(config):
    return config.parent / 'images/test/0.jpg'


@pytest.fixture
def refused(capsys):
    """Call a main function that has to end in one sentence; return it."""

    def run(tool, *args):
        with pytest.raises(SystemExit) as stop:
            tool.main(list(map(str, args)))
        code = stop.value.code
        if code == 2:
            # argparse prints its usage, and the sentence in one line.
            code = capsys.readouterr().err.splitlines()[-1]
        assert '\n' not in code and ': error: ' in code
        return code

    return run


# anytime.py


@pytest.fixture(scope='module')
def anytime():
    return load_tool('tools/analysis_tools/anytime.py')


def test_anytime_draws_each_evaluation(anytime, config, checkpoint, image, tmp_path,
                                       capsys):  # fmt: skip
    out = tmp_path / 'new' / 'folder'
    anytime.main([*map(str, (config, checkpoint, image)), '--out-dir', str(out),
                  '--max-steps', '6', '--tol', '0', '--device', 'cpu'])  # fmt: skip
    printed = capsys.readouterr().out
    assert '1 sample(s): 100% max_steps; 6.0 evaluations' in printed
    assert printed.splitlines()[-2:] == [f'{out}/0.png', f'{out}/0.gif']
    with Image.open(out / '0.gif') as animation:
        assert animation.n_frames == 6
        seconds = []
        for i in range(6):
            animation.seek(i)
            seconds.append(animation.info['duration'] / 1000)
        assert seconds == [anytime.FRAME_SECONDS] * 5 + [anytime.LAST_SECONDS]
    with Image.open(out / '0.png') as strip:
        pixels = np.asarray(strip.convert('RGB'))
    # Pictures, and not blank paper, in both rows and the curve below.
    assert all((part < 200).mean() > 0.01 for part in np.array_split(pixels, 3))


@pytest.mark.parametrize(
    ('size', 'steps', 'most'),
    [((2048, 1024), 12, 2000), ((200, 900), 30, 4500), ((900, 100), 1, 2000)],
    ids=['wide', 'tall', 'very wide'],
)
def test_strips_of_any_shape(anytime, tmp_path, size, steps, most):
    """No strip is wider than 16 inches, and 30 evaluations of a tall image fit."""
    width, height = size
    image = np.zeros((height // 4, width // 4, 3), np.uint8)
    labels = torch.zeros(image.shape[:2], dtype=torch.int64)
    found = [Snapshot(k + 1, 0.5**k, labels) for k in range(steps)]
    path = tmp_path / 'strip.png'
    palette = np.array([[200, 0, 0]], np.uint8)
    anytime.draw_strip(image, found, ['road'], palette, 0.5, path)
    with Image.open(path) as strip:
        assert 800 <= strip.size[0] <= 1600 and strip.size[1] <= most


def test_overlay_mixes_colours(anytime):
    image = np.full((1, 2, 3), 100, np.uint8)
    palette = np.array([[200, 0, 50], [0, 0, 0]], np.uint8)
    found = anytime.overlay(image, np.array([[0, 1]]), palette, 0.25)
    assert found.tolist() == [[[125, 75, 88], [75, 75, 75]]]


def test_agreement_is_not_rounded_up_to_all(anytime):
    last = np.zeros((100, 100), int)
    almost = last.copy()
    almost[0, 0] = 1
    half = last.copy()
    half[:50] = 1
    found = [anytime.agreement(labels, last) for labels in (last, almost, half)]
    assert found == ['100.0%', '99.9%', '50.0%']


def test_names_and_colours(anytime, config, checkpoint):
    """Of the checkpoint, then of the config, then made up."""
    cfg = Config.fromfile(config)
    model = load_model(cfg, checkpoint, 'cpu')
    classes, palette = anytime.names_and_colours(model, cfg)
    # The checkpoint's is unknown.
    assert classes == ['dark', 'bright'] and len(palette) == 2
    model.dataset_meta = {}
    classes, palette = anytime.names_and_colours(model, cfg)
    assert palette.tolist() == [[0, 0, 0], [255, 255, 0]]
    model.decode_head.num_classes = 25
    classes, palette = anytime.names_and_colours(model, cfg)
    assert classes[24] == 'class 24' and palette.shape == (25, 3)


def test_photographs_are_turned_as_pipelines_turn_them(anytime, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (30, 20)).save(path, exif=exif)
    assert anytime.read_image(path).shape == cv2.imread(str(path)).shape == (30, 20, 3)


def test_anytime_refuses(anytime, refused, config, checkpoint, image, tmp_path):
    def said(*options, config=config, checkpoint=checkpoint, image=image):
        return refused(anytime, config, checkpoint, image, '--out-dir', tmp_path,
                       '--device', 'cpu', *options)  # fmt: skip

    assert 'absent.jpg' in said(image=tmp_path / 'absent.jpg')
    text = tmp_path / 'text.jpg'
    text.write_text('no image')
    assert f"the image '{text}' cannot be read" in said(image=text)
    text.write_bytes(image.read_bytes()[:500])
    assert f"the image '{text}' cannot be read" in said(image=text)
    assert 'absent.pth' in said(checkpoint=tmp_path / 'absent.pth')
    assert 'absent.py' in said(config=tmp_path / 'absent.py')
    assert 'is no segmentation config' in said(config=TINY)
    wide = ['--cfg-options', 'model.decode_head.channels=9']
    assert 'random.pth: decode_head' in said(*wide)
    for option, value, words in (
        ('--max-steps', '0', '--max-steps is 0'),
        ('--tol', '-1', '--tol is -1.0'),
        ('--tol', 'nan', '--tol is nan'),
        ('--opacity', '0', '--opacity is 0.0'),
        ('--opacity', '1.5', '--opacity is 1.5'),
    ):
        assert words in said(option, value)
    (tmp_path / 'file').touch()
    assert 'File exists' in said('--out-dir', tmp_path / 'file')
    assert not list(tmp_path.glob('*.png'))


def test_anytime_refuses_other_backbones(anytime, refused, config, image, tmp_path):
    other = tmp_path / 'resnet.py'
    other.write_text(
        f'_base_ = {str(config)!r}\n'
        "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18,\n"
        '                           base_channels=8, out_indices=(0, 1)),\n'
        '             decode_head=dict(in_channels=(8, 16)))\n'
    )
    model = load_model(Config.fromfile(other), device='cpu')
    path = tmp_path / 'resnet.pth'
    torch.save(model.state_dict(), path)
    said = refused(anytime, other, path, image, '--out-dir', tmp_path)
    assert (
        "ResNet has no solver to watch: give a config whose backbone is of type='MDEQ'"
        in said
    )


# inference_cost.py


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
    yield import_module('inference_cost')
    sys.modules.pop('inference_cost')


def test_options_of_the_backbone_go_to_mdeq_alone(cost):
    options = {'model.backbone.eval_solver': dict(type='AndersonSolver'),
               'model.head.topk': (1, 2)}  # fmt: skip
    mdeq, resnet = (cost.prepare(str(path), options) for path in (TINY, RESNET))
    assert mdeq.model.backbone.eval_solver.type == 'AndersonSolver'
    assert 'eval_solver' not in resnet.model.backbone
    assert mdeq.model.head.topk == resnet.model.head.topk == (1, 2)


def test_segmentation_is_of_whole_images(cost, tmp_path, config):
    slide = tmp_path / 'slide.py'
    slide.write_text(
        f'_base_ = {str(config)!r}\n'
        "model = dict(test_cfg=dict(mode='slide', crop_size=(8, 8), stride=(4, 4)))"
    )
    assert cost.prepare(str(slide), None).model.test_cfg == dict(mode='whole')


@pytest.mark.parametrize('batch', [1, 2])
def test_what_is_measured(cost, config, batch):
    anderson = dict(type='AndersonSolver', max_steps=5, tol=0)
    solver = {'model.backbone.eval_solver': anderson}
    for path, shape in ((TINY, (16, 16)), (config, (24, 21))):
        cfg = cost.prepare(str(path), solver)
        measured = cost.Measured(cfg, None, shape, batch, 'cpu')
        before = measured.describe()
        model = load_model(cfg, device='cpu')
        assert before['parameters'] == sum(p.numel() for p in model.parameters())
        first, second = measured.run(), measured.run()
        assert first['evaluations'] == second['evaluations'] == 5
        assert second['seconds'] > 0
        assert second['peak'] >= before['before'] > 1e7
        assert len(measured.model.backbone.last_solution.steps) == batch


def test_peak_memory_is_seen(repo_root):
    """In a process of its own, where no memory was freed that a block could reuse."""
    code = (
        'import inference_cost as cost, numpy as np\n'
        'now, peak = cost.process_memory()\n'
        'block = np.ones(200_000_000, np.uint8)\n'
        'print(now, peak, cost.process_memory()[1])'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=repo_root / 'tools' / 'analysis_tools',
        capture_output=True,
        text=True,
        check=True,
    )
    now, peak, after = map(int, done.stdout.split())
    assert now <= peak
    assert after >= now + 0.9 * 200_000_000


def test_ratios_are_to_the_last(cost):
    measured = {
        'a': dict(parameters=2e6, before=1e8, seconds=[9.0, 4.0, 6.0], evaluations=12.0,
                  peak=3e8),
        'b': dict(parameters=4e6, before=2e8, seconds=[3.0, 5.0, 2.0], evaluations=None,
                  peak=6e8),
    }  # fmt: skip
    results = cost.tabulate(measured, 'title', 'note')
    assert results.rows == {
        'a': [2.0, 12.0, 6.0, 2.0, 0.5, 100.0, 300.0, 0.5],
        'b': [4.0, None, 3.0, 1.0, None, 200.0, 600.0, 1.0],
    }


def test_labels_tell_models_apart(cost, refused):
    found = cost.name_models(
        [('x/a.py', None), ('x/b.py', None), ('y/b.py', 'w/best.pth')]
    )
    assert found == ['a', 'b (random)', 'b (best.pth)']
    with pytest.raises(SystemExit, match=r"'a \(random\)' is named twice"):
        cost.name_models([('x/a.py', None), ('x/a.py', None)])


def test_inference_cost_refuses(cost, refused, config, tmp_path):
    for options, words in (
        (['--batch', '0'], '--batch is 0'),
        (['--repeat', '0'], '--repeat is 0'),
        (['--threads', '-1'], '--threads is -1'),
        (['--shape', '0', '8'], '--shape is 0 8'),
    ):
        assert words in refused(cost, TINY, *options)
    assert 'absent.py' in refused(cost, 'absent.py')
    assert 'absent.pth' in refused(cost, f'{TINY}=absent.pth')
    bare = tmp_path / 'bare.py'
    bare.write_text("default_scope = 'mmseg'")
    assert 'has no model to measure' in refused(cost, bare)


@pytest.mark.slow
def test_models_are_measured_in_processes(cost, refused, config, checkpoint, tmp_path,
                                          capsys):  # fmt: skip
    out = tmp_path / 'new' / 'cost.json'
    cost.main([f'{config}={checkpoint}', str(RESNET), '--shape', '32', '32',
               '--repeat', '2', '--threads', '1', '--device', 'cpu', '--markdown',
               '--json', str(out)])  # fmt: skip
    printed = capsys.readouterr().out
    assert '| resnet50_2xb64-50e_cifar10 |' in printed
    assert 'Inference of 1 image of 32x32 pixels' in printed
    content = json.loads(out.read_text())
    mdeq, resnet = content['figures'].values()
    assert mdeq['evaluations'] == 27 and resnet['evaluations'] is None
    assert resnet['relative time'] == resnet['relative peak'] == 1
    assert resnet['parameters, M'] == pytest.approx(23.52, abs=0.01)
    assert [len(m['seconds']) for m in content['measured'].values()] == [2, 2]

    said = refused(cost, f'{RESNET}={checkpoint}', '--device', 'cpu')
    assert 'of another architecture' in said
