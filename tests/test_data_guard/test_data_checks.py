"""Checks of data sets, on files made for them."""

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

pytest.importorskip('mmseg', reason='mmseg is not installed')
from mmcv.transforms import TRANSFORMS
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.structures import BaseDataElement
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import IterableDataset

from mdeq_mm.data_guard import (
    SampleCheck,
    check_dataset,
    examine,
    guard_samples,
    leaves,
    replace_samples,
    replaced_in,
)
from mdeq_mm.data_guard.data_guard_hook import _warn
from tests.hostile_images import DAMAGED, encoded


class Lettered(BaseSegDataset):
    METAINFO = dict(classes=('a', 'b', 'c'))


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


# Images and their labels.


def image_set(folder, labels=(0, 1, 0, 1, 2), **options):
    """A classification data set of the five images."""
    data = BaseDataset(
        data_root=str(folder),
        pipeline=[TRANSFORMS.build(dict(type='LoadImageFromFile')), Keep()],
        metainfo=dict(classes=CLASSES),
        lazy_init=True,
        **options,
    )
    data.load_data_list = lambda: [
        dict(img_path=f'{folder}/images/{i}.jpg', gt_label=label)
        for i, label in enumerate(labels)
    ]
    data.full_init()
    return data


class Keep:
    """Leaves the place and the label of a sample."""

    def __call__(self, results):
        return {k: results[k] for k in ('sample_idx', 'gt_label', 'img_path')}


def test_images_without_label_maps_are_counted(folder):
    data = image_set(folder)
    found = examine(TorchConcatDataset([data, RepeatDataset(data, 2)]), 'd')
    assert (found.images, found.label_maps, found.problems) == (10, 0, [])
    assert found.sizes == {'d.datasets[0]': 5, 'd.datasets[1].dataset': 5}
    assert found.classes['d.datasets[0]'] == {0: 2, 1: 2, 2: 1}
    assert examine(data, 'd', images=False).images == 0
    shares = [examine(data, 'd', share=(rank, 2)) for rank in (0, 1)]
    assert [found.images for found in shares] == [3, 2]


def test_classes_of_joint_data_sets(folder):
    """The parts of a MultiTaskDataset are a dict of data sets."""
    both = SimpleNamespace(datasets=dict(cls=image_set(folder), seg=dataset(folder)))
    found = examine(both, 'd')
    assert (found.images, found.label_maps) == (5, 5)
    (folder / 'images/3.jpg').write_bytes(b'')
    found = examine(both, 'd')
    names = [(problem.dataset, problem.index) for problem in found.problems]
    assert names == [('d.datasets.cls', 3), ('d.datasets.seg', 3)]


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_images(folder, kind):
    _, content, words = DAMAGED[kind]
    path = folder / 'images/2.jpg'
    path.write_bytes(content)
    said = refused(image_set(folder), 'd')
    assert said.startswith(str(path)) and words in said


def test_damage_in_the_middle_is_found_where_all_is_decoded(folder):
    """The look at both ends, which is quick, cannot."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    content = bytearray(encoded(noise, 'PNG'))
    content[1000:1100] = bytes(100)
    (folder / 'images/2.jpg').write_bytes(content)
    assert not examine(image_set(folder), 'd').problems
    (problem,) = examine(image_set(folder), 'd', images='whole').problems
    assert problem.index == 2 and problem.path.endswith('images/2.jpg')


@pytest.mark.parametrize(
    ('label', 'outputs', 'words'),
    [
        (3, None, 'gt_label=3, but labels are 0 to 2'),
        (3, 4, None),
        (-1, 4, 'gt_label=-1, but labels are 0 to 3'),
        ([0, 2], None, None),
        ([0, 3], None, 'gt_label=[0, 3], but labels are 0 to 2'),
        (np.int64(2), None, None),
        (1.0, None, 'gt_label=1.0'),
        ('cat', None, "gt_label='cat'"),
        ([], None, None),
    ],
)
def test_labels_of_images(folder, label, outputs, words):
    data = image_set(folder, (0, 0, label, 0, 0))
    problems = examine(data, 'd', outputs=outputs).problems
    if words is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.index == 2 and words in problem.said
        assert f'{folder}/images/2.jpg has' in problem.said


def test_images_in_memory_have_labels_alone(folder):
    """As those of mmpretrain's CIFAR10."""
    data = image_set(folder)
    data.data_list = [dict(img=np.zeros(1), gt_label=label) for label in (0, 1, 9)]
    data.serialize_data = False
    (problem,) = examine(data, 'd').problems
    assert problem.said.startswith('sample 2 of d has gt_label=9')


def test_what_need_not_be_there_is_not_looked_at(folder):
    """Files of a server, and those that their loader does without."""
    (folder / 'images/2.jpg').unlink()
    for loader in (
        dict(ignore_empty=True),
        dict(backend_args=dict(backend='http')),
    ):
        data = image_set(folder)
        data.pipeline.transforms[0] = TRANSFORMS.build(
            dict(type='LoadImageFromFile', **loader)
        )
        assert examine(data, 'd').images == 0


def test_no_more_are_looked_for_than_asked(folder):
    for path in (folder / 'images').iterdir():
        path.write_bytes(b'')
    data = RepeatDataset(image_set(folder), 2)
    assert len(examine(data, 'd').problems) == 5
    long = image_set(folder)
    long.load_data_list, short = None, long.load_data_list
    long._fully_initialized = False
    long.load_data_list = lambda: short() * 200
    long.full_init()
    assert len(examine(long, 'd', workers=1, most=lambda n: 10).problems) == 256


def test_progress_is_told(folder):
    told = []
    examine(image_set(folder), 'd', progress=lambda *step: told.append(step))
    assert told == [('d', 5, 5)]


# What takes the places of others.


@pytest.mark.parametrize(
    ('bad', 'places'),
    [
        ([], [0, 1, 2, 3, 4]),
        ([1], [0, 2, 2, 3, 4]),
        ([1, 2, 4], [0, 3, 3, 3, 0]),
        ([0, 4], [1, 1, 2, 3, 1]),
        ([0, 1, 2, 3], [4, 4, 4, 4, 4]),
    ],
)
def test_the_next_sound_sample_takes_the_place(folder, bad, places):
    data = image_set(folder)
    replace_samples(data, bad)
    assert [item['sample_idx'] for item in data] == places
    assert data[-1]['sample_idx'] == places[-1]
    # Again, as when a training is started twice: none stands upon another.
    replace_samples(data, [])
    assert [item['sample_idx'] for item in data] == [0, 1, 2, 3, 4]


def test_a_data_set_of_bad_samples_alone_is_refused(folder):
    with pytest.raises(ValueError, match='without a sound sample'):
        replace_samples(image_set(folder), range(5))


def test_workers_can_be_sent_what_is_replaced(folder):
    """As processes that are spawned, and not forked, are."""
    data = dataset(folder, pipeline=[LOAD[0]])
    replace_samples(data, [1])
    guard_samples(SampleCheck(data, 'd'), skip=True)
    (folder / 'images/2.jpg').write_bytes(b'')
    sent = pickle.loads(pickle.dumps(data))
    assert [Path(sent[i]['img_path']).stem for i in range(4)] == list('0333')


def test_a_row_of_bad_files_ends_the_search(folder):
    data = image_set(folder)
    guard_samples(SampleCheck(data, 'd'), skip=True)
    for path in (folder / 'images').iterdir():
        path.unlink()
    with pytest.raises(ValueError, match='5 samples of d in a row cannot be loaded'):
        data[1]


def test_batches_tell_what_they_lack():
    """Whatever they are nested in."""
    sample = BaseDataElement(metainfo=dict(replaced_samples=[('a', 'b')]))
    batch = dict(data_samples=[BaseDataElement(), [sample]], inputs=[1])
    assert list(replaced_in(batch)) == [('a', 'b')]
    assert list(replaced_in(None)) == []


def test_masks_of_0_and_255_leave_a_class_without_pixels(folder):
    """They are what other programs write for two classes; 255 is ignored here."""
    for path in folder.glob('labels/*.png'):
        save(path, np.array([[0, 255] * 4] * 6, np.uint8))
    data = dataset(folder, metainfo=dict(classes=('wall', 'crack')))
    found = examine(data, 'train_dataloader.dataset')
    assert not found.problems
    assert found.classes == {'train_dataloader.dataset': {0: 5}}
    texts = []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=texts.append))
    _warn(runner, found, data)
    (text,) = texts
    assert 'no pixels of 1 of its 2 classes: crack.' in text
    assert 'masks of 0 and 255' in text and '0 and 1' in text
    for path in folder.glob('labels/*.png'):
        save(path, np.array([[0, 1] * 4] * 6, np.uint8))
    found = examine(data, 'train_dataloader.dataset')
    assert found.classes == {'train_dataloader.dataset': {0: 5, 1: 5}}
    _warn(runner, found, data)
    assert len(texts) == 1


def test_label_maps_of_which_every_pixel_is_ignored(folder):
    """As masks of 0 and 255 are whose 0 is ignored too."""
    for path in folder.glob('labels/*.png'):
        save(path, np.array([[0, 255] * 4] * 6, np.uint8))
    classes = dict(classes=('wall', 'crack'))
    data = dataset(folder, metainfo=classes, reduce_zero_label=True)
    texts = []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=texts.append))
    _warn(runner, examine(data, 'train_dataloader.dataset'), data)
    (text,) = texts
    assert 'no pixels of 2 of its 2 classes: wall, crack.' in text


@pytest.mark.parametrize(
    ('options', 'classes'),
    [
        (dict(), {0: 5, 1: 5, 2: 5}),
        (dict(reduce_zero_label=True), {0: 5, 1: 5}),
        (dict(metainfo=dict(classes=('c',))), {0: 5}),
    ],
    ids=str,
)
def test_label_maps_are_counted_by_class(folder, options, classes):
    """Whatever number a class has in the files."""
    found = examine(dataset(folder, cls=Lettered, **options), 'd')
    assert {k: v for k, v in found.classes['d'].items() if k != 255} == classes
