"""Each Cityscapes config trains, evaluates, saves, resumes and is tested.

This goes through the main functions of tools/train.py and tools/test.py, on a folder
of Cityscapes' layout. ``--data-root`` names it, and one option the pretrained file,
which has the form of a checkpoint of an ImageNet config (or no file, for the
baselines, whose files would have to be downloaded). The rest of the command line
makes it small enough for a CPU: images of 128x64 pixels, crops of 64x32, and
iterations counted on the fingers.
"""

import json
import shutil
import sys
from importlib import import_module
from itertools import count
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config
from yapf.yapflib import yapf_api

from mdeq_mm.checkpoints import read_checkpoint
from mdeq_mm.models import MDEQ
from tests.cityscapes_folder import CLASSES, IGNORED, write_cityscapes
from tests.helpers import load_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs/cityscapes'
TOOLBOX = Path(mmseg.__file__).parent / '.mim' / 'tools'
S = '4xb3-124k_cityscapes-512x1024'

STAGES = ('train', 'val', 'test')
# What a CPU, and no more than four images, need. No workers, and no packing of the
# list of images for them: starting them takes longer than loading these images.
OPTIONS = [
    *(f'{stage}_dataloader.num_workers=0' for stage in STAGES),
    *(f'{stage}_dataloader.dataset.serialize_data=False' for stage in STAGES),
    'model.data_preprocessor.size=(32,64)',
    'train_dataloader.dataset.pipeline.2.scale=(128,64)',
    'train_dataloader.dataset.pipeline.3.crop_size=(32,64)',
    'val_dataloader.dataset.pipeline.1.scale=(128,64)',
    'test_dataloader.dataset.pipeline.1.scale=(128,64)',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.logger.interval=1',
]
MONITORED = 'default_hooks.monitor.interval=1'
# Mostly the smallest of the six sizes, each of which is evaluated twice.
SIZES = [f'tta_pipeline.1.transforms.0.{i}.scale_factor=0.5' for i in (1, 3, 4, 5)]

FAST = (f'fcn_mdeq-small_{S}', f'fcn_hr18s_{S}')
CASES = [
    pytest.param(
        path.stem,
        id=path.stem,
        marks=() if path.stem in FAST else (pytest.mark.slow, pytest.mark.timeout(600)),
    )
    for path in sorted(CONFIGS.glob('*.py'))
]


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp('cityscapes'), dict(train=3, val=1))


@pytest.fixture
def work_dir(tmp_path):
    """A folder that is removed at once: checkpoints of large models fill disks."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the main function of train.py or test.py with a command line.

    They are this project's, or the toolbox's own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    # Set by the tools themselves; taken back after the test.
    monkeypatch.setenv('LOCAL_RANK', '0')
    # mmengine prints a config five times a run, and lays it out anew each time, which
    # takes longer than the run.
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **style: (text, True))
    numbers = count()

    def run(name, *args, options, folder=ROOT / 'tools'):
        # A visualizer lives as long as its process, known by its name: under the one
        # that mmseg's configs share, it would log to the folder of an earlier run.
        fresh = f'visualizer.name={tmp_path}/{next(numbers)}'
        line = [*args, '--cfg-options', *options, fresh]
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, line)])
        if folder == TOOLBOX:
            load_tool(folder / f'{name}.py').main()
            return
        # Python's own standard library has a package called test.
        monkeypatch.delitem(sys.modules, name, raising=False)
        import_module(name).main()

    return run


def pretrained(config, path):
    """Write a checkpoint as an ImageNet config would; return its state dict."""
    cfg = Config.fromfile(config).model.backbone
    kind = {k: cfg[k] for k in ('arch', 'out_norm_cfg') if k in cfg}
    backbone = MDEQ(**kind)
    backbone.init_weights()
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    state |= {
        'neck.0.final.conv.weight': torch.zeros(8, 8, 1, 1),
        'head.fc.weight': torch.zeros(1000, 8),
    }
    torch.save(dict(state_dict=state, meta=dict(epoch=100)), path)
    return state


def records(work_dir):
    """All records that the runs in a work dir have logged."""
    return [
        json.loads(line)
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]


def mean_iou(predicted, data_root):
    """Of label images in a folder, against those of the validation set, in per cent."""
    counts = np.zeros((CLASSES, CLASSES))
    paths = sorted(predicted.iterdir())
    truths = sorted(Path(data_root).glob('gtFine/val/*/*.png'))
    assert len(paths) == len(truths) > 0
    for path, truth in zip(paths, truths, strict=True):
        assert path.name.split('_left')[0] == truth.name.split('_gt')[0]
        found, wanted = (
            cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (path, truth)
        )
        assert found.shape == wanted.shape
        seen = wanted != IGNORED
        np.add.at(counts, (wanted[seen], found[seen]), 1)
    both = np.diag(counts)
    return 100 * np.mean(both / (counts.sum(0) + counts.sum(1) - both))


def metrics(work_dir):
    """What the only test in a work dir has measured."""
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


@pytest.mark.parametrize('name', CASES)
def test_train_evaluate_save_resume_test(name, call, cityscapes, work_dir):
    config = CONFIGS / f'{name}.py'
    is_mdeq = 'mdeq' in name
    start, options = work_dir / 'imagenet.pth', list(OPTIONS)
    if is_mdeq:
        state = pretrained(config, start)
        options += [MONITORED, f'model.backbone.init_cfg.checkpoint={start}']
    else:
        options += ['model.backbone.init_cfg=None']

    # One iteration; of the official models, unrolled.
    unrolled = 'official' in name
    if unrolled:
        options.append('default_hooks.warmup.end=1')
    out = work_dir / 'trained'
    common = [config, '--data-root', cityscapes, '--work-dir', out]
    call('train', *common, options=[*options, 'train_cfg.max_iters=1'])
    trained, evaluated = records(out)
    assert np.isfinite(trained['loss']) and 0 <= evaluated['mIoU'] <= 100
    assert (out / 'best_mIoU_iter_1.pth').is_file()
    if is_mdeq:
        if unrolled:
            assert trained['eq_steps'] == 3 and 'adjoint_steps' not in trained
        else:
            # Its phantom steps are unrolled as well: no product with a Jacobian.
            assert 1 < trained['eq_steps'] <= 5 and 'adjoint_steps' not in trained
        log = ''.join(p.read_text() for p in out.glob('*/*.log'))
        # All but what is no part of the backbone.
        number = len(state) - 2
        assert f'MDEQ: loaded {number} of {number} entries from {start}' in log

    # From there on, at the equilibrium: no pretrained file is needed any more.
    start.unlink(missing_ok=True)
    options += ['model.backbone.init_cfg=None']
    call('train', *common, '--resume',
         options=[*options, 'train_cfg.max_iters=2'])  # fmt: skip
    resumed = [r for r in records(out) if r.get('iter') == 2]
    assert len(records(out)) == 4 and len(resumed) == 1
    assert np.isfinite(resumed[0]['loss'])
    if unrolled:
        assert 3 < resumed[0]['eq_steps'] <= 28
        assert 1 < resumed[0]['adjoint_steps'] <= 31
    elif is_mdeq:
        assert 1 < resumed[0]['eq_steps'] <= 5 and 'adjoint_steps' not in resumed[0]
    saved = read_checkpoint(str(out / 'iter_2.pth'))
    assert saved['meta']['iter'] == 2

    # The whole image; a window as large as the image, which has to be the same; and
    # smaller windows that overlap.
    def test(folder, *args, more=()):
        folder = work_dir / folder
        call('test', config, out / 'iter_2.pth', '--data-root', cityscapes,
             '--work-dir', folder, '--out', folder / 'labels', *args,
             options=[*options, *more])  # fmt: skip
        expected = mean_iou(folder / 'labels', cityscapes)
        assert metrics(folder)['mIoU'] == pytest.approx(expected, abs=0.01)
        return [
            cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            for path in sorted((folder / 'labels').iterdir())
        ]

    def slide(crop, stride):
        return [
            'model.test_cfg.mode=slide',
            f'model.test_cfg.crop_size={crop}',
            f'model.test_cfg.stride={stride}',
        ]

    whole = test('whole')
    window = test('window', more=slide('(64,128)', '(64,128)'))
    for a, b in zip(whole, window, strict=True):
        np.testing.assert_array_equal(a, b)
    test('windows', more=slide('(32,64)', '(21,43)'))
    test('augmented', '--tta', more=SIZES)


def test_the_default_pretrained_file_is_asked_for(call, cityscapes, work_dir):
    """Its absence ends in a sentence that names both ways out."""
    config = CONFIGS / f'fcn_mdeq-small_{S}.py'
    with pytest.raises(SystemExit) as stop:
        call('train', config, '--data-root', cityscapes, '--work-dir', work_dir,
             options=OPTIONS)  # fmt: skip
    said = stop.value.code
    assert 'work_dirs/mdeq-small_4xb32-100e_in1k/epoch_100.pth' in said
    assert 'init_cfg.checkpoint' in said and 'init_cfg=None' in said


def test_the_toolbox_trains_and_tests_a_config(call, cityscapes, work_dir):
    """mmseg's own scripts, whose way to override data_root is three options."""
    if not (TOOLBOX / 'train.py').is_file():
        pytest.skip('mmseg was installed without its tools')
    config = CONFIGS / f'fcn_mdeq-small_{S}.py'
    options = [
        *OPTIONS,
        *(f'{stage}_dataloader.persistent_workers=False' for stage in STAGES),
        *(f'{stage}_dataloader.dataset.data_root={cityscapes}' for stage in STAGES),
        MONITORED,
        'model.backbone.init_cfg=None',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
    ]
    out, tested = work_dir / 'trained', work_dir / 'tested'
    call('train', config, '--work-dir', out, options=options, folder=TOOLBOX)
    first, second, evaluated = records(out)
    assert all(1 < record['eq_steps'] <= 5 for record in (first, second))
    call('test', config, out / 'iter_2.pth', '--work-dir', tested, options=options,
         folder=TOOLBOX)  # fmt: skip
    assert metrics(tested)['mIoU'] == pytest.approx(evaluated['mIoU'], abs=1e-6)
