"""Two data sets as one."""

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

import cv2
import numpy as np
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmpretrain.structures import DataSample
from mmseg.datasets import BaseSegDataset
from mmseg.structures import SegDataSample
from torch.utils.data import DataLoader

from mdeq_mm.registry import DATASETS, MODELS

CLASSES = tuple('abc')
SCENES = ('ground', 'object')


class LabelledScenes(BaseSegDataset):
    """Scenes that have a class too: the number in the name of the file, modulo 3."""

    def load_data_list(self):
        data = super().load_data_list()
        for info in data:
            info['gt_label'] = int(info['img_path'].split('/')[-1][:-4]) % 3
        return data


@pytest.fixture
def data(tmp_path):
    """Configs of 7 images with a class, sorted by class, and 3 with a label map."""
    rng = np.random.default_rng(0)
    for i in range(7):
        folder = tmp_path / 'cls' / CLASSES[i // 3]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f'{i}.png'), rng.integers(0, 255, (8, 8, 3), np.uint8))
    for kind in ('images', 'labels'):
        (tmp_path / 'seg' / kind).mkdir(parents=True)
    for i in range(3):
        image = rng.integers(0, 255, (12, 10, 3), np.uint8)
        cv2.imwrite(str(tmp_path / 'seg' / 'images' / f'{i}.png'), image)
        labels = np.full((12, 10), i % 2, np.uint8)
        cv2.imwrite(str(tmp_path / 'seg' / 'labels' / f'{i}.png'), labels)
    cls = dict(
        type='CustomDataset',
        data_root=str(tmp_path / 'cls'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )
    return dict(cls=cls, seg=scenes(tmp_path / 'seg'))


def scenes(root, **packing):
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        metainfo=dict(classes=SCENES, palette=[[0, 0, 0], [9, 9, 9]]),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs', **packing),
        ],
    )


def build(datasets, **options):
    init_default_scope('mmseg')
    return DATASETS.build(dict(type='MultiTaskDataset', datasets=datasets, **options))


def name(sample):
    """Task and number of a sample."""
    return sample.task, int(sample.img_path.split('/')[-1][:-4])


ALL = {('cls', i) for i in range(7)} | {('seg', i) for i in range(3)}


def test_in_evaluation_each_sample_comes_once(data):
    dataset = build(data, pair=False)
    assert len(dataset) == 10
    samples = [dataset[i]['data_samples'] for i in range(10)]
    assert [name(s) for s in samples] == sorted(ALL)
    for sample in samples:
        kind = DataSample if sample.task == 'cls' else SegDataSample
        assert type(sample) is kind
    assert [s.gt_label.item() for s in samples[:7]] == [0, 0, 0, 1, 1, 1, 2]
    assert [s.gt_sem_seg.data.unique().item() for s in samples[7:]] == [0, 1, 0]
    for index in (10, -1):
        with pytest.raises(IndexError, match=f'index {index} is out of range of 10'):
            dataset[index]
    assert str(dataset) == 'MultiTaskDataset(cls: 7, seg: 3, pair=False)'


@pytest.mark.parametrize(
    ('counts', 'length', 'repeated'),
    [
        (None, 7, dict(cls=7, seg=7)),
        (dict(cls=2), 4, dict(cls=8, seg=4)),
        (dict(cls=3, seg=2), 3, dict(cls=9, seg=6)),
        (dict(seg=2), 7, dict(cls=7, seg=14)),
        (dict(cls=20), 3, dict(cls=60, seg=3)),
    ],
)
def test_in_training_each_item_holds_all_tasks(data, counts, length, repeated):
    dataset = build(data, counts=counts)
    assert len(dataset) == length
    counts = dict(cls=1, seg=1) | (counts or {})
    seen = []
    for i in range(length):
        item = dataset[i]
        tasks = [s.task for s in item['data_samples']]
        assert tasks == ['cls'] * counts['cls'] + ['seg'] * counts['seg']
        sizes = [tuple(x.shape) for x in item['inputs']]
        assert sizes == [(3, 8, 8) if t == 'cls' else (3, 12, 10) for t in tasks]
        names = [name(s) for s in item['data_samples']]
        # No image twice in an item, unless a data set has fewer.
        for task, images in (('cls', 7), ('seg', 3)):
            different = {n for n in names if n[0] == task}
            assert len(different) == min(counts[task], images)
        seen += names
    for task, total in repeated.items():
        times = [seen.count(n) for n in ALL if n[0] == task]
        assert sum(times) == total and max(times) - min(times) <= 1
    for index in (length, -1):
        with pytest.raises(IndexError, match='out of range'):
            dataset[index]


def test_items_mix_the_classes_of_a_sorted_data_set(data):
    """The same ones in every process, whatever the random state."""

    def items():
        dataset = build(data, counts=dict(cls=3))
        return [[name(s) for s in dataset[i]['data_samples']] for i in range(3)]

    first = items()
    set_random_seed(1)
    assert items() == first
    labels = [[number // 3 for task, number in i if task == 'cls'] for i in first]
    assert all(len(set(item)) > 1 for item in labels)


def test_meta_information_of_each_task(data):
    meta = build(data).metainfo
    assert tuple(meta['classes']) == SCENES
    assert tuple(meta['tasks']['cls']['classes']) == CLASSES
    assert tuple(meta['tasks']['seg']['classes']) == SCENES
    assert 'tasks' in build(dict(cls=data['cls'])).metainfo


def test_images_with_both_labels(data, tmp_path):
    """A data set of mmseg, whose samples carry a class through the pipeline."""
    cfg = scenes(tmp_path / 'seg', meta_keys=('img_path', 'ori_shape', 'gt_label'))
    dataset = build(dict(both=cfg | dict(type=LabelledScenes)))
    assert tuple(dataset.metainfo['classes']) == SCENES
    batch = pseudo_collate([dataset[i] for i in range(3)])
    init_default_scope('mmseg')
    preprocess = MODELS.build(dict(type='MultiTaskDataPreprocessor'))
    out = preprocess(batch, True)
    assert list(out['inputs']) == ['both'] and len(out['inputs']['both']) == 3
    for sample in out['data_samples']:
        assert sample.gt_label.tolist() == [name(sample)[1] % 3]
        assert sample.gt_sem_seg.data.shape == (1, 12, 10)


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_as_the_runner_loads_them(data, workers):
    loader = DataLoader(
        build(data, counts=dict(cls=2)),
        batch_size=3,
        num_workers=workers,
        collate_fn=pseudo_collate,
    )
    init_default_scope('mmseg')
    preprocess = MODELS.build(dict(type='MultiTaskDataPreprocessor'))
    first = preprocess(next(iter(loader)), True)
    assert {k: len(v) for k, v in first['inputs'].items()} == dict(cls=6, seg=3)
    # Each image is still beside its own labels.
    by_name = {}
    dataset = build(data, pair=False)
    for i in range(10):
        item = dataset[i]
        by_name[name(item['data_samples'])] = item['inputs'].float()
    for task, images in first['inputs'].items():
        samples = [s for s in first['data_samples'] if s.task == task]
        for image, sample in zip(images, samples, strict=True):
            torch.testing.assert_close(image, by_name[name(sample)])


def test_what_is_refused(data, tmp_path):
    for datasets in ([data['cls']], {}, None):
        with pytest.raises(TypeError, match='dict from task'):
            build(datasets)
    with pytest.raises(ValueError, match="datasets has the unknown task 'depth'"):
        build(data | dict(depth=data['seg']))
    with pytest.raises(ValueError, match="counts has the unknown task 'both'"):
        build(data, counts=dict(both=1))
    with pytest.raises(ValueError, match=r"counts\['cls'\]=0 is too small"):
        build(data, counts=dict(cls=0))
    with pytest.raises(TypeError, match=r"counts\['seg'\] must be an integer"):
        build(data, counts=dict(seg=1.5))
    (tmp_path / 'empty' / 'images').mkdir(parents=True)
    for options in (dict(), dict(lazy_init=True, serialize_data=False)):
        empty = scenes(tmp_path / 'empty') | options
        with pytest.raises(ValueError) as refused:
            build(dict(cls=data['cls'], seg=empty))
        assert "datasets['seg'] (BaseSegDataset)" in str(refused.value)
        assert 'data_root and data_prefix' in str(refused.value)
