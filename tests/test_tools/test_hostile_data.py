"""Trainings by tools/train.py on files that are damaged, odd, absent or stray.

Each names the file and stops before it starts, or leaves it out, counts it and tells
of it; what only looks odd is trained on. The model is MDEQ of the smallest size with
one step, on images of 32 pixels.
"""

import logging
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, TRANSFORMS, init_default_scope
from PIL import Image

from tests.hostile_images import DAMAGED, JPEG, SOUND, encoded

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ('cat', 'dog')

CLASSIFICATION = """
_base_ = [{root}/configs/_base_/default_runtime.py']
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[127.0] * 3, std=[64.0] * 3),
    backbone=dict(
        type='MDEQ', arch='cifar-tiny',
        gradient=dict(type='UnrolledGradient', steps=1)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=24))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32),
    dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root={data}, data_prefix='train', pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root={data}, data_prefix='val', pipeline=pipeline))
val_evaluator = dict(type='Accuracy', topk=(1,))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
custom_hooks = [dict(type='SeenHook')]
"""

SEGMENTATION = """
_base_ = [{root}/configs/_base_/default_runtime_seg.py']
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[127.0] * 3, std=[64.0] * 3, size=(32, 32)),
    backbone=dict(
        type='MDEQ', arch='cifar-tiny',
        gradient=dict(type='UnrolledGradient', steps=1)),
    decode_head=dict(
        type='FCNHead', in_channels=24, in_index=0, channels=4, num_convs=1,
        concat_input=False, num_classes=2, norm_cfg=dict(type='BN')),
    test_cfg=dict(mode='whole'))
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset', data_root={data},
        metainfo=dict(classes=('a', 'b'), palette=[[0, 0, 0], [9, 9, 9]]),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')]))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
custom_hooks = [dict(type='SeenHook')]
"""


class SeenHook(Hook):
    """Notes the files of all training batches, and spoils some after the check."""

    paths = ()
    spoil = staticmethod(lambda: None)

    def before_train(self, runner):
        type(self).paths = []
        self.spoil()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.paths += [s.img_path for s in data_batch['data_samples']]


@pytest.fixture(autouse=True)
def seen():
    HOOKS.register_module(module=SeenHook, force=True)
    SeenHook.paths = []
    yield SeenHook
    SeenHook.spoil = staticmethod(lambda: None)
    HOOKS.module_dict.pop('SeenHook')


@pytest.fixture
def warned(monkeypatch):
    """Texts of warnings; each Runner has a logger of its own, so all are heard."""
    texts, handle = [], MMLogger.callHandlers

    def listen(self, record):
        if record.levelno >= logging.WARNING:
            texts.append(record.getMessage())
        handle(self, record)

    monkeypatch.setattr(MMLogger, 'callHandlers', listen)
    return texts


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Call tools/train.py in this process; return its work folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.setenv('LOCAL_RANK', '0')

    def run(config, *options):
        work_dir = tmp_path / 'work'
        line = ['tools/train.py', config, '--work-dir', work_dir]
        line += ['--cfg-options', *options] if options else []
        monkeypatch.setattr(sys, 'argv', list(map(str, line)))
        monkeypatch.delitem(sys.modules, 'train', raising=False)
        import_module('train').main()
        return work_dir

    return run


@pytest.fixture
def refused(train):
    """A training that has to end in one sentence, which is returned."""

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            train(*args)
        assert isinstance(stop.value.code, str)
        assert stop.value.code.startswith('train.py: error: ')
        assert '\n' not in stop.value.code
        # Before the first step.
        assert SeenHook.paths == []
        return stop.value.code

    return run


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def config_of(text, folder):
    text = text.replace('{root}', f"'{ROOT}").replace('{data}', repr(str(folder)))
    return write(folder / 'config.py', text.encode())


@pytest.fixture
def images(tmp_path):
    """Four sound images of each of two classes, and two for validation."""
    folder = tmp_path / 'data'
    for name in CLASSES:
        for i in range(4):
            write(folder / f'train/{name}/{i}.jpg', JPEG)
        write(folder / f'val/{name}/0.jpg', JPEG)
    return folder


@pytest.fixture
def scenes(tmp_path):
    """Eight sound images with label maps of two classes."""
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    folder = tmp_path / 'scenes'
    labels = np.eye(32, dtype=np.uint8)
    labels[0, 1] = 255
    for i in range(8):
        write(folder / f'images/{i}.jpg', JPEG)
        write(folder / f'labels/{i}.png', encoded(labels, 'PNG'))
    return folder


SKIP = ["default_hooks.data.on_error='skip'", 'default_hooks.data.max_share=0.8']
WORKERS = ['train_dataloader.num_workers=2']
# Where a training ends with an error, PyTorch may wait 5 s for each of its workers.
ONE_WORKER = ['train_dataloader.num_workers=1']


def listed(work_dir, name='skipped_files.txt'):
    lines = (work_dir / name).read_text(encoding='utf-8').splitlines()
    return dict(line.split('\t') for line in lines)


# Images.


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_damaged_image_is_named_before_the_first_step(images, refused, kind):
    suffix, content, words = DAMAGED[kind]
    path = write(images / f'train/cat/2 bad{suffix}', content)
    text = refused(config_of(CLASSIFICATION, images))
    assert str(path) in text and words in text


def test_odd_images_are_trained_on(images, train, seen, warned):
    """And loaded as what they show, whatever their kind and their names are."""
    for i, (suffix, content, _) in enumerate(SOUND.values()):
        write(images / f'train/cat/grüße 猫 {i}{suffix}', content)
    write(images / 'train/dog/UPPER.JPG', JPEG)
    work_dir = train(config_of(CLASSIFICATION, images))
    assert len(seen.paths) == len(set(seen.paths)) == 9 + len(SOUND)
    assert sum('猫' in path for path in seen.paths) == len(SOUND)
    assert (work_dir / 'epoch_1.pth').is_file()
    assert not (work_dir / 'skipped_files.txt').exists()
    assert not [text for text in warned if str(images) in text]


@pytest.mark.parametrize('kind', SOUND)
def test_odd_images_are_loaded_as_what_they_show(images, kind):
    mmpretrain = pytest.importorskip('mmpretrain.datasets')
    init_default_scope('mmpretrain')
    suffix, content, pixels = SOUND[kind]
    write(images / f'train/cat/x{suffix}', content)
    data = mmpretrain.CustomDataset(
        data_root=str(images), data_prefix='train', pipeline=[
            dict(type='LoadImageFromFile')])  # fmt: skip
    (item,) = [d for d in data if Path(d['img_path']).stem == 'x']
    found = item['img'][..., ::-1]
    assert found.shape == pixels.shape
    # JPEG and WebP lose some.
    assert np.abs(found.astype(int) - pixels).mean() < 3


def test_links_that_lead_nowhere_are_named(images, refused):
    """The toolboxes pass over them, and would train on what is left."""
    path = images / 'train/dog/9.jpg'
    path.symlink_to('/mnt/gone/9.jpg')
    text = refused(config_of(CLASSIFICATION, images))
    assert f'{path} does not exist: it is a link to /mnt/gone/9.jpg' in text


def annotated(images, *lines):
    (images / 'train.txt').write_text('\n'.join(('cat/0.jpg 0', 'dog/1.jpg 1', *lines)))
    return [
        'train_dataloader.dataset.ann_file=train.txt',
        "train_dataloader.dataset.metainfo.classes=['cat','dog']",
    ]


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('cat/absent.jpg 0', 'cat/absent.jpg does not exist'),
        ('cat/folder.jpg 0', 'folder.jpg cannot be read as an image (it is a folder)'),
        ('cat/gone.jpg 0', 'it is a link to /mnt/gone.jpg, which is gone'),
        ('cat/2.jpg 2', 'cat/2.jpg has gt_label=2, but labels are 0 to 1'),
        ('cat/2.jpg -1', 'cat/2.jpg has gt_label=-1, but labels are 0 to 1'),
        ('cat/2.jpg 255', 'cat/2.jpg has gt_label=255'),
    ],
)
def test_what_an_annotation_file_says_is_checked(images, refused, line, words):
    (images / 'train/cat/folder.jpg').mkdir()
    (images / 'train/cat/gone.jpg').symlink_to('/mnt/gone.jpg')
    text = refused(config_of(CLASSIFICATION, images), *annotated(images, line))
    assert words in text


@pytest.mark.skipif(os.geteuid() == 0, reason='the root user may read everything')
def test_a_file_that_may_not_be_read(images, refused):
    path = images / 'train/cat/1.jpg'
    path.chmod(0)
    text = refused(config_of(CLASSIFICATION, images))
    assert str(path) in text and 'Permission denied' in text


def test_several_are_counted_and_listed(images, refused, tmp_path):
    bad = [write(images / f'train/{name}/8.jpg', b'') for name in CLASSES]
    text = refused(config_of(CLASSIFICATION, images))
    assert f'{bad[0]} cannot be read as an image (it is empty)' in text
    assert text.endswith(f'; and 1 more, listed in {tmp_path}/work/unfit_files.txt')
    assert list(listed(tmp_path / 'work', 'unfit_files.txt')) == list(map(str, bad))


def test_class_folders_without_images(images, train, refused, warned):
    """One is warned of; where all are empty, the training does not start."""
    (images / 'train/horse').mkdir()
    three = ['model.head.num_classes=3', 'val_dataloader=None', 'val_evaluator=None',
             'val_cfg=None']  # fmt: skip
    train(config_of(CLASSIFICATION, images), *three)
    (text,) = [t for t in warned if 'has no samples of' in t]
    assert text == (
        'train_dataloader.dataset has no samples of 1 of its 3 classes: horse.'
    )
    for path in images.glob('train/*/*.jpg'):
        path.unlink()
    SeenHook.paths = []
    text = refused(config_of(CLASSIFICATION, images), *three)
    assert 'train_dataloader' in text


def test_dark_images_of_sixteen_bits_are_warned_of(images, train, warned):
    """12 bits of a sensor, in the lower part of 16."""
    array = np.linspace(0, 4095, 1024).reshape(32, 32).astype(np.uint16)
    path = images / 'train/cat/sensor.png'
    Image.fromarray(array).save(path)
    train(config_of(CLASSIFICATION, images))
    (text,) = [t for t in warned if '16 bits' in t]
    assert '1 or more images of 16 bits are almost black' in text and str(path) in text


def test_the_look_at_images_can_be_turned_off(images, train, seen):
    path = write(images / 'train/cat/5.jpg', JPEG + bytes(9))
    path.unlink()
    write(images / 'train/cat/5.jpg', b'')
    # The loader, then, meets it in the middle of the training, and it is named.
    with pytest.raises(SystemExit) as stop:
        train(config_of(CLASSIFICATION, images), 'default_hooks.data.images=False')
    assert f'{path} cannot be read as an image (it is empty)' in stop.value.code


# Left out.


@pytest.mark.parametrize('workers', [(), WORKERS], ids=['alone', 'workers'])
def test_unfit_images_are_left_out_counted_and_listed(
    images, train, seen, warned, workers
):
    bad = {}
    for suffix, content, words in DAMAGED.values():
        path = write(images / f'train/cat/1 {len(bad)}{suffix}', content)
        bad[str(path)] = words
    link = images / 'train/cat/1 link.jpg'
    link.symlink_to('/mnt/gone')
    config = config_of(CLASSIFICATION, images)
    work_dir = train(config, *SKIP, *workers)
    lines = listed(work_dir)
    assert set(lines) == {*bad, str(link)}
    for path, words in bad.items():
        assert words in lines[path]
    (text,) = [t for t in warned if 'cannot be used' in t]
    total = 8 + len(bad)
    assert f'{len(bad) + 1} of {total} training samples' in text
    # The length of the epoch stays, and the next sound sample is in their places.
    assert len(seen.paths) == total
    assert not set(seen.paths) & set(bad)
    assert seen.paths.count(str(images / 'train/cat/1.jpg')) == 1 + len(bad)
    for name in ('cat/0', 'cat/2', 'dog/3'):
        assert seen.paths.count(str(images / f'train/{name}.jpg')) == 1


def test_stray_labels_are_left_out(images, train, seen):
    lines = annotated(images, 'cat/1.jpg 0', 'cat/2.jpg 7', 'cat/3.jpg 0')
    work_dir = train(config_of(CLASSIFICATION, images), *SKIP, *lines)
    assert 'gt_label=7' in listed(work_dir)[str(images / 'train/cat/2.jpg')]
    names = [Path(path).name for path in seen.paths]
    assert names == ['0.jpg', '1.jpg', '1.jpg', '3.jpg', '3.jpg']


def test_too_many_unfit_files_end_it(images, refused):
    write(images / 'train/cat/1.jpg', b'')
    text = refused(config_of(CLASSIFICATION, images), SKIP[0])
    assert '1 or more of the 8 samples of train_dataloader.dataset' in text
    assert 'max_share=0.1' in text and 'cat/1.jpg' in text


def test_validation_images_are_never_left_out(images, refused):
    path = write(images / 'val/dog/0.jpg', JPEG[:200])
    text = refused(config_of(CLASSIFICATION, images), *SKIP)
    assert str(path) in text and 'the results on val_dataloader.dataset' in text


# Files that go bad after the check.


def spoil(path, content):
    """Called when the training begins: what is None is removed."""
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ('content', 'workers'),
    [
        (None, ()),
        (b'', ()),
        (b'', ONE_WORKER),
        (JPEG[:150], ()),
        pytest.param(JPEG[:150], WORKERS, marks=pytest.mark.slow),
        pytest.param(None, WORKERS, marks=pytest.mark.slow),
    ],
)
def test_a_file_that_goes_bad_is_named(images, train, seen, content, workers):
    path = images / 'train/dog/1.jpg'
    seen.spoil = staticmethod(lambda: spoil(path, content))
    with pytest.raises((SystemExit, FileNotFoundError, ValueError)) as stop:
        train(config_of(CLASSIFICATION, images), *workers)
    assert str(path) in str(stop.value)
    # The first batch was trained on.
    assert len(seen.paths) == 4


@pytest.mark.parametrize('workers', [(), WORKERS], ids=['alone', 'workers'])
def test_a_file_that_goes_bad_is_replaced(images, train, seen, warned, workers):
    paths = [images / f'train/dog/{i}.jpg' for i in (1, 2)]

    def begin():
        spoil(paths[0], None)
        spoil(paths[1], b'')

    seen.spoil = staticmethod(begin)
    work_dir = train(config_of(CLASSIFICATION, images), *SKIP, *workers)
    assert set(listed(work_dir)) == set(map(str, paths))
    names = [Path(path).name for path in seen.paths[4:]]
    assert names == ['0.jpg', '3.jpg', '3.jpg', '3.jpg']
    (text,) = [t for t in warned if 'since the training began' in t]
    assert 'others take their places' in text


def test_too_many_that_go_bad_end_it(images, train, seen):
    bad = [images / f'train/dog/{i}.jpg' for i in (1, 2)]
    seen.spoil = staticmethod(lambda: [spoil(path, b'') for path in bad])
    with pytest.raises(SystemExit, match='2 of 8 training samples have become'):
        train(config_of(CLASSIFICATION, images), SKIP[0])


class Faulty:
    """A transform that does not take one of the images."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, results):
        if results['img_path'].endswith('dog/1.jpg'):
            raise KeyError('a fault of mine')
        return results


@pytest.mark.parametrize(
    'workers', [(), pytest.param(ONE_WORKER, marks=pytest.mark.slow)]
)
def test_faults_of_the_pipeline_are_not_left_out(images, train, seen, workers):
    """They are no faults of the file, which is named beside them."""
    TRANSFORMS.register_module(module=Faulty, force=True)
    faulty = 'train_dataloader.dataset.pipeline.1.type=Faulty'
    with pytest.raises(KeyError, match='a fault of mine') as stop:
        train(config_of(CLASSIFICATION, images), *SKIP, faulty, *workers)
    TRANSFORMS.module_dict.pop('Faulty')
    told = ''.join(traceback.format_exception(stop.value))
    path = images / 'train/dog/1.jpg'
    assert f'This was sample 5 of train_dataloader.dataset: {path}' in told
    assert len(seen.paths) == 4


# Label maps.


def _label_map(value, dtype=np.uint8):
    labels = np.zeros((32, 32), dtype)
    labels[3, 4] = value
    return encoded(labels, 'PNG')


_HALF = encoded(np.random.default_rng(0).integers(0, 2, (32, 32), np.uint8), 'PNG')[:90]
LABEL_MAPS = {
    'stray': (_label_map(7), 'holds the label 7 in 1 of its pixels'),
    'stray, 16 bits': (_label_map(256, np.uint16), 'holds the label 256'),
    'colours': (encoded(np.zeros((32, 32, 3), np.uint8), 'PNG'), 'has 3 channels'),
    'size': (encoded(np.zeros((32, 31), np.uint8), 'PNG'), 'has 31x32 pixels'),
    'empty': (b'', 'cannot be read as an image'),
    'half': (_HALF, 'cannot be read as an image'),
    'absent': (None, 'does not exist'),
}


@pytest.mark.parametrize('kind', LABEL_MAPS)
def test_label_maps_that_do_not_fit(scenes, refused, kind):
    content, words = LABEL_MAPS[kind]
    path = scenes / 'labels/5.png'
    spoil(path, content)
    text = refused(config_of(SEGMENTATION, scenes))
    assert f'{path} {words}' in text


@pytest.mark.parametrize('workers', [(), ONE_WORKER], ids=['alone', 'worker'])
def test_label_maps_that_do_not_fit_are_left_out(scenes, train, seen, workers):
    for i, kind in enumerate(('stray', 'colours', 'half', 'absent')):
        spoil(scenes / f'labels/{i}.png', LABEL_MAPS[kind][0])
    work_dir = train(config_of(SEGMENTATION, scenes), *SKIP, *workers)
    assert set(listed(work_dir)) == {str(scenes / f'images/{i}.jpg') for i in range(4)}
    names = [Path(path).name for path in seen.paths]
    assert names == ['4.jpg'] * 5 + ['5.jpg', '6.jpg', '7.jpg']


@pytest.mark.parametrize(
    'workers', [(), pytest.param(ONE_WORKER, marks=pytest.mark.slow)]
)
def test_a_label_map_that_goes_bad_is_named(scenes, train, seen, workers):
    """PIL, which reads it in training, speaks of a buffer."""
    path = scenes / 'labels/6.png'
    seen.spoil = staticmethod(lambda: spoil(path, _HALF))
    with pytest.raises((SystemExit, ValueError)) as stop:
        train(config_of(SEGMENTATION, scenes), *workers)
    assert f'{path} cannot be read as an image' in str(stop.value)


# As users start it.


def test_the_command_says_one_sentence(images, tmp_path):
    path = write(images / 'train/cat/2.jpg', JPEG[:300])
    text = CLASSIFICATION.replace("custom_hooks = [dict(type='SeenHook')]", '')
    config = config_of(text, images)
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = subprocess.run(
        [sys.executable, ROOT / 'tools/train.py', config, '--work-dir', tmp_path / 'w'],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False)  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f'train.py: error: {path} cannot be read as an image (')
    assert 'Traceback' not in result.stderr
