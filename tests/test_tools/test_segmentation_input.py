"""Bad input to the training of a segmentor ends in a sentence before it begins.

This goes through the main function of tools/train.py, and through mmseg's own script,
on a config of two classes with two images of training and of validation data.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from yapf.yapflib import yapf_api

pytest.importorskip('mmseg', reason='mmseg is not installed')
import mmseg

from mdeq_mm.checkpoints import read_checkpoint
from mdeq_mm.models import MDEQ
from tests.helpers import load_tool
from tests.test_tools.test_train_test import (
    Code,
    call,  # noqa: F401
    refused,  # noqa: F401
    write_mmseg_config,
)

ROOT = Path(__file__).resolve().parents[2]
TOOLBOX = Path(mmseg.__file__).parent / '.mim' / 'tools'
SIZE = (33, 40)


@pytest.fixture
def data(tmp_path):
    """Folder of the data set, beside which its config lies."""
    folder = tmp_path / 'data'
    base = write_mmseg_config(folder)
    (tmp_path / 'config.py').write_text(
        f'_base_ = {str(base)!r}\n'
        "default_hooks = dict(data=dict(type='DataGuardHook'),\n"
        "                     guard=dict(type='CheckpointGuardHook'),\n"
        '                     logger=dict(interval=1))\n'
    )
    return folder


@pytest.fixture
def plain(monkeypatch):
    """Print configs as they are: laying them out takes longer than a run."""
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **style: (text, True))


@pytest.fixture
def said(refused, data, plain, tmp_path):  # noqa: F811
    """Train, which has to be refused before the first iteration; what was said."""

    def run(*options):
        work_dir = tmp_path / 'work'
        more = ['--cfg-options', *options] if options else []
        sentence = refused(
            'train', data.parent / 'config.py', '--work-dir', work_dir, *more
        )
        untrained(work_dir)
        return sentence

    return run


def untrained(work_dir):
    assert not list(work_dir.rglob('*.pth'))
    records = list(work_dir.rglob('scalars.json'))
    assert not any(path.read_text() for path in records)


def write(path, labels):
    assert cv2.imwrite(str(path), labels)


def blank(*shape, dtype=np.uint8):
    return np.zeros(shape or SIZE, dtype)


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def one_pixel(path, label, dtype=np.uint8):
    labels = blank(dtype=dtype)
    labels[3, 4] = label
    write(path, labels)


# What is done to an image and its label map, and what is said of either.
DAMAGES = {
    'size': (
        lambda image, labels: write(labels, blank(33, 41)),
        ('{labels} has 41x33 pixels', 'its image {image} has 40x33'),
    ),
    'outside': (
        lambda image, labels: one_pixel(labels, 2),
        ('{labels} holds the label 2 in 1 of', '0 to 1, or 255', 'metainfo.classes'),
    ),
    'wide': (
        lambda image, labels: one_pixel(labels, 256, np.uint16),
        ('{labels} holds the label 256 in 1 of',),
    ),
    'colours': (
        lambda image, labels: write(labels, blank(*SIZE, 3)),
        ('{labels} has 3 channels', 'not its colour'),
    ),
    'missing': (
        lambda image, labels: labels.unlink(),
        ('{labels} does not exist', 'label map of {image}', 'seg_map_suffix'),
    ),
    'half a label map': (
        lambda image, labels: truncate(labels),
        ('{labels} cannot be read as an image', 'truncated', 'replace the file'),
    ),
    'no label map': (
        lambda image, labels: labels.write_text('labels'),
        ('{labels} cannot be read as an image (it is of no known format)',),
    ),
    'half an image': (
        lambda image, labels: truncate(image),
        ('{image} cannot be read as an image', 'truncated'),
    ),
    'empty image': (
        lambda image, labels: image.write_bytes(b''),
        ('{image} cannot be read as an image (it is empty)',),
    ),
}


@pytest.mark.parametrize(
    ('damage', 'split'),
    # The split called test is the validation set, which is read at the end only.
    [(d, 'train') for d in DAMAGES] + [(d, 'test') for d in ('size', 'half an image')],
)
def test_a_bad_file_is_named(said, data, damage, split):
    spoil, words = DAMAGES[damage]
    files = dict(
        image=data / 'images' / split / '1.jpg',
        labels=data / 'annotations' / split / '1.png',
    )
    spoil(**files)
    sentence = said()
    for word in words:
        assert word.format(**files) in sentence


def shell(script, folder, *options):
    """Start a training as a user does."""
    more = ['--cfg-options', *options] if options else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return subprocess.run(
        [sys.executable, script, folder / 'config.py', '--work-dir', folder / 'work',
         *more],
        cwd=folder, env={**os.environ, 'PYTHONPATH': path},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def test_it_is_one_sentence_on_stderr(data, tmp_path):
    labels = data / 'annotations/test/0.png'
    write(labels, blank(10, 12))
    result = shell(ROOT / 'tools/train.py', tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f'train.py: error: {labels} has 12x10 pixels')
    assert 'Traceback' not in result.stderr + result.stdout
    untrained(tmp_path / 'work')


def test_the_toolbox_names_the_file(data, plain, monkeypatch, tmp_path):
    """Under mmseg's own script it is the hook's error that ends the training."""
    script = TOOLBOX / 'train.py'
    if not script.is_file():
        pytest.skip('mmseg was installed without its tools')
    labels = data / 'annotations/train/1.png'
    one_pixel(labels, 7)
    # The script sets it.
    monkeypatch.setenv('LOCAL_RANK', '0')
    line = [script, tmp_path / 'config.py', '--work-dir', tmp_path / 'work']
    monkeypatch.setattr(sys, 'argv', list(map(str, line)))
    with pytest.raises(ValueError, match=f'{labels} holds the label 7 in 1 of its'):
        load_tool(script).main()
    untrained(tmp_path / 'work')


@pytest.mark.timeout(60)
@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_data_root_without_images_does_not_hang(said, data, split, workers):
    """The sampler of the training looks for a first sample without end."""
    for image in (data / 'images' / split).iterdir():
        image.unlink()
    sentence = said(f'train_dataloader.num_workers={workers}')
    field = dict(train='train_dataloader', test='val_dataloader')[split]
    assert f'{field}.dataset finds no images in {str(data)!r}' in sentence
    assert f'images/{split}' in sentence and '--data-root' in sentence


@pytest.mark.timeout(60)
def test_images_of_another_suffix_are_no_images(said, data):
    sentence = said('train_dataloader.dataset.img_suffix=.jpeg')
    assert 'train_dataloader.dataset finds no images' in sentence
    assert 'img_suffix' in sentence


@pytest.mark.timeout(60)
def test_without_a_data_root_too(said, data):
    """data_prefix alone may name the folders."""
    empty = data / 'empty'
    empty.mkdir()
    sentence = said(
        'train_dataloader.dataset.data_root=None',
        f'train_dataloader.dataset.data_prefix.img_path={empty}',
    )
    assert 'train_dataloader.dataset finds no images' in sentence
    assert str(empty) in sentence


def test_a_missing_list_of_files_is_named(said, data):
    sentence = said('train_dataloader.dataset.ann_file=train.txt')
    assert 'train_dataloader' in sentence and str(data / 'train.txt') in sentence


def test_a_list_with_an_absent_image(said, data):
    (data / 'train.txt').write_text('0\nabsent\n')
    sentence = said('train_dataloader.dataset.ann_file=train.txt')
    assert f'{data}/images/train/absent.jpg does not exist' in sentence
    assert 'ann_file' in sentence


def test_heads_need_an_output_a_class(said):
    sentence = said('model.decode_head.num_classes=1')
    assert 'train_dataloader.dataset has 2 classes' in sentence
    assert 'model.decode_head.num_classes=1' in sentence


AUXILIARY = (
    "dict(type='FCNHead', in_channels=24, in_index=0, channels=8, num_convs=1, "
    'concat_input=False, align_corners=False, num_classes={})'
)


def test_auxiliary_heads_too(said, data):
    heads = ', '.join(AUXILIARY.format(n) for n in (2, 1))
    with open(data.parent / 'config.py', 'a') as file:
        file.write(f'model = dict(auxiliary_head=[{heads}])')
    assert 'model.auxiliary_head[1].num_classes=1' in said()


def test_classes_that_the_data_set_does_not_know(said, data):
    """A subset by metainfo, of which one name is misspelt."""
    cityscapes(data, "('road', 'skye')")
    sentence = said()
    assert 'train_dataloader' in sentence and 'skye' in sentence


def cityscapes(data, classes):
    """Let the data set be one whose type knows its 19 classes."""
    with open(data.parent / 'config.py', 'a') as file:
        dataset = (
            "dict(dataset=dict(type='CityscapesDataset', img_suffix='.jpg', "
            f"seg_map_suffix='.png', metainfo=dict(_delete_=True, classes={classes})))"
        )
        file.write(f'train_dataloader = {dataset}\nval_dataloader = {dataset}\n')


def test_a_subset_of_the_classes(said, call, data, tmp_path):  # noqa: F811
    """Files hold labels of all 19 classes, two of which were chosen."""
    cityscapes(data, "('road', 'sky')")
    files = [data / 'annotations' / s / f'{i}.png' for s in ('train', 'test')
             for i in (0, 1)]  # fmt: skip
    for path in files:
        one_pixel(path, 18)
    one_pixel(files[-1], 19)
    assert f'{files[-1]} holds the label 19' in said()
    one_pixel(files[-1], 10)
    trains(call, tmp_path)


def test_labels_that_are_reduced(said, call, data, tmp_path):  # noqa: F811
    """Files hold 0 for pixels to ignore, and classes from 1 on."""
    reduced = [f'{s}_dataloader.dataset.reduce_zero_label=True'
               for s in ('train', 'val')]  # fmt: skip
    labels = data / 'annotations/train/0.png'
    one_pixel(labels, 3)
    sentence = said(*reduced)
    assert f'{labels} holds the label 3' in sentence
    assert '1 to 2, or 0 or 255 for pixels to ignore' in sentence
    one_pixel(labels, 2)
    trains(call, tmp_path, *reduced)


def test_the_label_to_ignore_is_that_of_the_head(said, call, data, tmp_path):  # noqa: F811
    """255 is a class out of range to a head that ignores another label."""
    labels = data / 'annotations/train/0.png'
    one_pixel(labels, 255)
    # Images are padded with the label to ignore.
    fields = 'decode_head.ignore_index', 'data_preprocessor.seg_pad_val'
    ignore = [f'model.{field}=254' for field in fields]
    assert '0 to 1, or 254 for' in said(*ignore)
    one_pixel(labels, 254)
    trains(call, tmp_path, *ignore)


def trains(call, tmp_path, *options):  # noqa: F811
    """Train an iteration, which has to work, and look at the loss."""
    work_dir = tmp_path / 'good'
    call('train', tmp_path / 'config.py', '--work-dir', work_dir, '--cfg-options',
         'train_cfg.max_iters=1', 'train_cfg.val_interval=1',
         # Runs of one name and second share a log.
         'experiment_name=trains', *options)  # fmt: skip
    assert (work_dir / 'iter_1.pth').is_file()
    log = ''.join(path.read_text() for path in work_dir.rglob('*.log'))
    assert 'Checked 4 label maps' in log and 'nan' not in log.rpartition('Iter(')[2]


WRAPPERS = {
    'concatenated': (
        "dict(_delete_=True, type='ConcatDataset', datasets=[good, bad])",
        'train_dataloader.dataset.datasets[1]',
    ),
    'repeated': (
        "dict(_delete_=True, type='RepeatDataset', times=2, dataset=bad)",
        'train_dataloader.dataset.dataset',
    ),
    'both': (
        "dict(_delete_=True, type='RepeatDataset', times=2, dataset=dict("
        "type='ConcatDataset', datasets=[good, bad]))",
        'train_dataloader.dataset.dataset.datasets[1]',
    ),
}


def wrap(data, wrapper, bad):
    """Replace the training set by a wrapper of it and of a bad copy."""
    good = Config.fromfile(next(data.glob('*.py'))).train_dataloader.dataset.to_dict()
    with open(data.parent / 'config.py', 'a') as file:
        file.write(
            f'good = {good}\n'
            f'bad = dict(good, {bad})\n'
            f'train_dataloader = dict(dataset={wrapper})\n'
        )


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_data_sets_inside_of_wrappers(said, data, wrapper):
    prefix = "data_prefix=dict(img_path='images/bad', seg_map_path='labels/bad')"
    wrap(data, WRAPPERS[wrapper][0], prefix)
    for folder, kind in (('images', 'images'), ('labels', 'annotations')):
        (data / folder / 'bad').mkdir(parents=True)
        for path in (data / kind / 'train').iterdir():
            (data / folder / 'bad' / path.name).write_bytes(path.read_bytes())
    labels = data / 'labels/bad/1.png'
    one_pixel(labels, 9)
    assert f'{labels} holds the label 9' in said()


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_too_many_classes_inside_of_wrappers(said, data, wrapper):
    text, name = WRAPPERS[wrapper]
    classes = "metainfo=dict(classes=('a', 'b', 'c'))"
    wrap(data, text.replace('good', 'bad'), classes)
    sentence = said()
    assert 'has 3 classes and model.decode_head.num_classes=2' in sentence
    assert sentence.partition('error: ')[2].startswith(name.replace('[1]', '[0]'))


@pytest.mark.timeout(60)
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_no_images_inside_of_wrappers(said, data, wrapper):
    text, name = WRAPPERS[wrapper]
    wrap(data, text, "img_suffix='.bmp'")
    # As --cfg-options takes it.
    field = name.replace('[1]', '.1')
    assert f'{field} finds no images' in said()


# Checkpoints to start from


def checkpoint(path, arch='cifar-tiny', prefix='backbone.', **more):
    """A checkpoint as the training of a classifier writes it."""
    backbone = MDEQ(arch=arch)
    state = {f'{prefix}{k}': v for k, v in backbone.state_dict().items()}
    state |= {'head.fc.weight': torch.zeros(10, 8), **more}
    torch.save(dict(state_dict=state, meta=dict(epoch=1)), path)
    return path


def start_from(path, prefix='backbone.'):
    init = 'model.backbone.init_cfg.{}={}'.format
    options = [init('type', 'Pretrained'), init('checkpoint', path)]
    return options + ([init('prefix', prefix)] if prefix else [])


WIDER = dict(channels=(32, 32), num_groups=8, expansion=5, downsample_times=0)
DEEPER = dict(channels=(24, 24, 24), num_groups=8, expansion=5, downsample_times=0)


@pytest.mark.parametrize(
    ('arch', 'words'),
    [
        (WIDER, ('(32, 3, 3, 3) in the checkpoint and (24, 3, 3, 3) in MDEQ', 'arch')),
        (DEEPER, ('of another architecture',)),
    ],
    ids=['channels', 'branches'],
)
def test_a_classifier_of_other_channels(said, tmp_path, arch, words):
    path = checkpoint(tmp_path / 'classifier.pth', arch)
    sentence = said(*start_from(path))
    for word in (str(path), *words):
        assert word in sentence


def test_other_channels_by_load_from(said, tmp_path):
    path = checkpoint(tmp_path / 'classifier.pth', WIDER)
    sentence = said(f'load_from={path}')
    assert str(path) in sentence and '(32, 3, 3, 3) in the checkpoint' in sentence


def test_a_checkpoint_that_does_not_exist(said, tmp_path):
    sentence = said(*start_from(tmp_path / 'absent.pth'))
    assert f'{tmp_path}/absent.pth of init_cfg does not exist' in sentence
    assert 'init_cfg=None' in sentence


@pytest.mark.parametrize('prefix', ['model.', None])
def test_a_prefix_that_the_checkpoint_lacks(said, tmp_path, prefix):
    path = checkpoint(tmp_path / 'classifier.pth')
    sentence = said(*start_from(path, prefix))
    assert str(path) in sentence and 'carry another prefix' in sentence


def test_a_checkpoint_with_numbers_that_are_not_finite(said, tmp_path):
    weight = MDEQ(arch='cifar-tiny').state_dict()['stem.0.conv.weight'] * torch.nan
    name = 'backbone.stem.0.conv.weight'
    path = checkpoint(tmp_path / 'classifier.pth', **{name: weight})
    sentence = said(*start_from(path))
    assert f'{path}: stem.0.conv.weight holds non-finite numbers' in sentence


def test_a_checkpoint_that_would_run_code(said, tmp_path):
    path = tmp_path / 'hostile.pth'
    path.write_bytes(pickle.dumps(dict(state_dict=Code())))
    for options in (start_from(path), [f'load_from={path}']):
        sentence = said(*options)
        assert str(path) in sentence and 'only code in the file could make' in sentence
    assert not Path('ran').exists()


def test_a_truncated_checkpoint(said, tmp_path):
    path = checkpoint(tmp_path / 'classifier.pth')
    truncate(path)
    sentence = said(*start_from(path))
    assert str(path) in sentence and 'the file is damaged' in sentence


def test_a_checkpoint_that_fits_is_loaded(call, data, plain, tmp_path):  # noqa: F811
    path = checkpoint(tmp_path / 'classifier.pth')
    trains(call, tmp_path, *start_from(path))
    log = ''.join(p.read_text() for p in (tmp_path / 'good').rglob('*.log'))
    number = len(read_checkpoint(str(path))['state_dict']) - 1
    assert f'MDEQ: loaded {number} of {number} entries from {path}' in log
    assert 'left in the file, not loaded: head.fc (1)' in log


def test_windows_without_a_size_are_refused(said):
    sentence = said('model.test_cfg.mode=slide')
    assert "mode='slide' lacks crop_size and stride" in sentence
