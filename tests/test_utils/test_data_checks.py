"""Checks of segmentation data sets, on files made for them."""

import os
import shutil

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

pytest.importorskip('mmseg', reason='mmseg is not installed')
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import IterableDataset

from mdeq_mm.utils.data_checks import check_dataset, leaves

SIZE = (8, 6)
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
CLASSES = ('a', 'b', 'c')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture
def folder(tmp_path):
    """Five images with label maps of the labels 0, 1, 2 and 255."""
    for kind in ('images', 'labels'):
        (tmp_path / kind).mkdir()
    for i in range(5):
        save(tmp_path / f'images/{i}.jpg', np.full((*SIZE[::-1], 3), 10 * i, np.uint8))
        labels = np.zeros(SIZE[::-1], np.uint8)
        labels[:3, 0] = 1, 2, 255
        save(tmp_path / f'labels/{i}.png', labels)
    return tmp_path


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)


def dataset(folder, cls=BaseSegDataset, pipeline=LOAD, **options):
    if cls is BaseSegDataset:
        options.setdefault('metainfo', dict(classes=CLASSES))
    options.setdefault('img_suffix', '.jpg')
    return cls(
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=pipeline,
        **options,
    )


def pixel(folder, label, dtype=np.uint8, index=2):
    labels = np.zeros(SIZE[::-1], dtype)
    labels[4, 5] = label
    save(folder / f'labels/{index}.png', labels)
    return folder / f'labels/{index}.png'


def refused(*args, **options):
    with pytest.raises((FileNotFoundError, ValueError)) as stop:
        check_dataset(*args, **options)
    assert '\n' not in str(stop.value)
    return str(stop.value)


def test_good_data_sets_are_counted(folder):
    data = dataset(folder)
    assert check_dataset(data, 'd') == 5
    assert check_dataset(RepeatDataset(data, 3), 'd') == 5
    assert check_dataset(ConcatDataset([data, dataset(folder)]), 'd') == 10


def test_names_of_parts(folder):
    data = dataset(folder)
    both = TorchConcatDataset([RepeatDataset(data, 2), data])
    names = [name for name, _ in leaves(both, 'train')]
    assert names == ['train.datasets[0].dataset', 'train.datasets[1]']


def test_processes_share_the_files(folder):
    data = dataset(folder)
    assert [check_dataset(data, 'd', share=(r, 2)) for r in (0, 1)] == [3, 2]
    path = pixel(folder, 9)
    assert str(path) in refused(data, 'd', share=(0, 2))
    assert check_dataset(data, 'd', share=(1, 2)) == 2


@pytest.mark.parametrize('workers', [1, 4])
def test_the_first_of_several_is_named(folder, workers):
    for index in (1, 4):
        pixel(folder, 3, index=index)
    said = refused(dataset(folder), 'd', workers=workers)
    assert said.startswith(f'{folder}/labels/1.png holds the label 3 in 1 of')


def test_sixteen_bits_of_small_labels_are_fine(folder):
    """mmseg casts them to bytes, so that 256 would be the class 0."""
    pixel(folder, 2, np.uint16)
    assert check_dataset(dataset(folder), 'd') == 5
    pixel(folder, 256, np.uint16)
    assert 'label 256' in refused(dataset(folder), 'd')


def test_palette_images_hold_indices(folder):
    image = Image.fromarray(np.full(SIZE[::-1], 2, np.uint8), mode='L').convert('P')
    image.putpalette([7, 8, 9] * 256)
    image.save(folder / 'labels/2.png')
    assert check_dataset(dataset(folder), 'd') == 5
    pixel(folder, 3)
    with Image.open(folder / 'labels/2.png') as image:
        image.convert('P').save(folder / 'labels/2.png')
    assert 'label 3' in refused(dataset(folder), 'd')


def test_one_bit_a_pixel(folder):
    """A mask of two classes; its 1 is written as 255 by some libraries."""
    path = folder / 'labels/2.png'
    Image.fromarray(np.eye(*SIZE[::-1], dtype=bool)).save(path)
    assert check_dataset(dataset(folder), 'd') == 5
    one = dict(metainfo=dict(classes=('a',)))
    assert 'label 1 ' in refused(dataset(folder, **one), 'd')


def test_labels_to_ignore(folder):
    path = pixel(folder, 77)
    said = refused(dataset(folder), 'd')
    assert '0 to 2, or 255 for pixels to ignore' in said
    # The other label maps hold 255.
    both = dict(ignored=[77, 255])
    assert check_dataset(dataset(folder), 'd', **both) == 5
    data = dataset(folder, ignore_index=77)
    assert f'{folder}/labels/0.png holds the label 255' in refused(data, 'd')
    assert 'labels are 0 to 2:' in refused(data, 'd', ignored=[])
    shutil.copy(path, folder / 'labels/0.png')
    for i in (1, 3, 4):
        shutil.copy(path, folder / f'labels/{i}.png')
    assert check_dataset(data, 'd') == 5


def test_reduced_labels(folder):
    data = dataset(folder, reduce_zero_label=True)
    pixel(folder, 3)
    assert check_dataset(data, 'd') == 5
    pixel(folder, 4)
    assert '1 to 3, or 0 or 255' in refused(data, 'd')


def test_a_subset_of_the_classes(folder):
    some = dict(metainfo=dict(classes=('sky', 'wall')), reduce_zero_label=True)
    data = dataset(folder, ADE20KDataset, **some)
    pixel(folder, 150)
    assert check_dataset(data, 'd') == 5
    pixel(folder, 151)
    assert 'labels are 1 to 150, or 0 or 255' in refused(data, 'd')


def test_without_class_names_any_label_will_do(folder):
    pixel(folder, 200)
    assert check_dataset(dataset(folder, metainfo=None), 'd') == 5


def test_sizes_without_labels(folder):
    """decode=False looks at headers alone."""
    pixel(folder, 9)
    assert check_dataset(dataset(folder), 'd', decode=False) == 5
    save(folder / 'labels/2.png', np.zeros(SIZE, np.uint8))
    said = refused(dataset(folder), 'd', decode=False)
    assert 'has 6x8 pixels and its image' in said and 'has 8x6' in said


def test_images_on_their_side_are_turned(folder):
    """OpenCV follows EXIF when it loads an image, and so does this."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / 'images/2.jpg', np.zeros((*SIZE, 3), np.uint8), exif=exif)
    data = dataset(folder)
    item = data[2]
    assert item['img'].shape[:2] == item['gt_seg_map'].shape == SIZE[::-1]
    assert check_dataset(data, 'd') == 5
    exif[0x0112] = 1
    save(folder / 'images/2.jpg', np.zeros((*SIZE, 3), np.uint8), exif=exif)
    assert 'has 6x8' in refused(data, 'd')


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp'])
def test_half_an_image(folder, suffix):
    """Only what breaks loading is refused: a file may have something appended."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    for i in range(5):
        save(folder / f'images/{i}{suffix}', noise)
        save(folder / f'labels/{i}.png', np.zeros((60, 80), np.uint8))
    data = dataset(folder, img_suffix=suffix)
    path = folder / f'images/2{suffix}'
    content = path.read_bytes()
    path.write_bytes(content + bytes(2000))
    assert check_dataset(data, 'd') == 5
    path.write_bytes(content[: len(content) // 2])
    if suffix == '.bmp':
        # Has no end to look for.
        assert check_dataset(data, 'd') == 5
    else:
        assert f'{path} cannot be read as an image' in refused(data, 'd')


def test_a_damaged_label_map_is_seen_inside(folder):
    """Its end is there, and what is before it makes no sense."""
    path = folder / 'labels/2.png'
    content = bytearray(path.read_bytes())
    at = content.index(b'IDAT') + 8
    content[at : at + 4] = b'\0\0\0\0'
    path.write_bytes(content)
    assert f'{path} cannot be read as an image' in refused(dataset(folder), 'd')


@pytest.mark.skipif(os.geteuid() == 0, reason='the root user may read everything')
def test_files_that_may_not_be_read(folder):
    path = folder / 'labels/2.png'
    path.chmod(0)
    said = refused(dataset(folder), 'd')
    assert str(path) in said and 'Permission denied' in said


def test_a_folder_in_place_of_a_file(folder):
    path = folder / 'labels/2.png'
    path.unlink()
    path.mkdir()
    assert f'{path} cannot be read as an image' in refused(dataset(folder), 'd')


def test_an_empty_data_set(folder):
    empty = dataset(folder, img_suffix='.tif', serialize_data=False)
    said = refused(ConcatDataset([dataset(folder), empty]), 'val_dataloader.dataset')
    for words in (
        'val_dataloader.dataset.datasets[1] (BaseSegDataset) has no samples',
        f'data_root={str(folder)!r}',
        f"'img_path': '{folder}/images'",
        "end in '.tif'",
    ):
        assert words in said
    assert 'd (Nothing) has no samples; correct' in refused(Nothing(), 'd')


class Nothing:
    def __len__(self):
        return 0


def test_what_reads_no_label_maps_is_only_counted(folder):
    """Such as a test set without labels, whose config still names their folder."""
    shutil.rmtree(folder / 'labels')
    data = dataset(folder, pipeline=LOAD[:1])
    assert check_dataset(data, 'd') == 0
    assert check_dataset(Stream(), 'd') == 0
    assert check_dataset([1, 2], 'd') == 0


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


def test_loading_inside_of_other_transforms_is_seen(folder):
    """Test-time augmentation loads label maps once for all its images."""
    nested = [
        LOAD[0],
        dict(
            type='TestTimeAug',
            transforms=[[dict(type='RandomFlip', prob=0.0)], [LOAD[1]]],
        ),
    ]
    path = pixel(folder, 9)
    assert str(path) in refused(dataset(folder, pipeline=nested), 'd')


def test_images_of_other_kinds_are_left_to_their_loader(folder):
    """Such as satellite images, which PIL cannot open; label maps are checked."""
    for i in range(5):
        (folder / f'images/{i}.npy').write_bytes(b'')
    pipeline = [dict(type='LoadImageFromNDArray'), LOAD[1]]
    data = dataset(folder, img_suffix='.npy', pipeline=pipeline)
    assert check_dataset(data, 'd') == 5
    path = pixel(folder, 9)
    assert str(path) in refused(data, 'd')
