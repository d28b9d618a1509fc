"""Names of classes stand in the order in which mmpretrain numbers their folders."""

import pytest
from mmengine.dataset import RepeatDataset
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
from mmpretrain.datasets import CustomDataset

from mdeq_mm.data_guard import check_class_order


@pytest.fixture
def shapes(tmp_path):
    for name in ('circle', 'square', 'triangle'):
        (tmp_path / name).mkdir()
        Image.new('L', (2, 2)).save(tmp_path / name / 'a.png')

    def dataset(classes):
        return CustomDataset(data_root=str(tmp_path), metainfo=dict(classes=classes))

    return dataset


@pytest.mark.parametrize(
    'classes', [('circle', 'square', 'triangle'), ('round', 'even', 'sharp'), None]
)
def test_sound_ones(shapes, classes):
    check_class_order(RepeatDataset(shapes(classes), 2), 'dataset')
    check_class_order(object(), 'dataset')


@pytest.mark.parametrize('first', ['square', 'sqare'])
def test_another_order(shapes, first):
    """What mmpretrain would call the images of circles."""
    classes = (first, 'circle', 'triangle')
    dataset = shapes(classes)
    assert dataset.CLASSES[dataset[0]['gt_label']] == first
    with pytest.raises(ValueError) as error:
        check_class_order(RepeatDataset(dataset, 2), 'loader.dataset')
    assert str(error.value) == (
        f'loader.dataset.dataset.metainfo.classes={classes} names the images of the '
        f"folder 'circle' {first!r}: folders are numbered in alphabetical order, so "
        "give the names as ('circle', 'square', 'triangle')"
    )
