"""The hook that looks at the data before training, and who is asked to do it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler, pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, init_default_scope
from mmengine.structures import BaseDataElement
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip('mmseg', reason='mmseg is not installed')
from mmengine.model import BaseTTAModel
from mmseg.datasets import BaseSegDataset

from mdeq_mm.data_guard import (
    DataGuardHook,
    Findings,
    SampleCheck,
    check_outputs,
    data_guard_hook,
    examine,
    expected_labels,
)
from tests.helpers import logged

FILES = 5


@pytest.fixture
def folder(tmp_path):
    for i in range(FILES):
        for kind, shape in (('images', (6, 8, 3)), ('labels', (6, 8))):
            (tmp_path / kind).mkdir(exist_ok=True)
            array = np.zeros(shape, np.uint8)
            Image.fromarray(array).save(tmp_path / kind / f'{i}.png')
    return tmp_path


def loader(folder, classes=('a', 'b'), **options):
    init_default_scope('mmseg')
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    data = BaseSegDataset(
        data_root=str(folder),
        img_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=classes),
        pipeline=load,
        **options,
    )
    return SimpleNamespace(dataset=data)


def head(num_classes=2, ignore_index=255):
    module = nn.Module()
    module.num_classes, module.ignore_index = num_classes, ignore_index
    return module


def runner(train, val=None, work_dir=None, **model):
    module = nn.Module()
    for name, part in model.items():
        setattr(module, name, part)
    return SimpleNamespace(
        train_dataloader=train,
        val_loop=val,
        val_dataloader=val,
        test_dataloader=train,
        model=module,
        work_dir=work_dir,
        logger=MMLogger.get_current_instance(),
    )


def pixel(folder, label, index=3):
    labels = np.zeros((6, 8), np.uint8)
    labels[1, 2] = label
    path = folder / f'labels/{index}.png'
    Image.fromarray(labels).save(path)
    return path


def test_it_is_registered_and_early():
    hook = HOOKS.build(dict(type='DataGuardHook', decode=False, workers=3))
    assert type(hook) is DataGuardHook
    assert (hook.decode, hook.workers, hook.priority) == (False, 3, 'VERY_HIGH')


def test_training_and_validation_sets_are_counted(folder):
    with logged() as said:
        DataGuardHook().before_train(runner(loader(folder), loader(folder)))
    assert any('Checked 10 label maps in 0.' in text for text in said)
    with logged() as said:
        DataGuardHook().before_train(runner(loader(folder)))
    assert any('Checked 5 label maps' in text for text in said)


def test_nothing_is_said_of_nothing():
    with logged() as said:
        DataGuardHook().before_train(runner(SimpleNamespace(dataset=[1, 2])))
    assert said == []


def test_each_stage_looks_at_its_own(folder, tmp_path):
    path = pixel(folder, 7)
    with pytest.raises(ValueError, match=f'{path} holds the label 7'):
        DataGuardHook().before_train(runner(loader(folder)))
    with pytest.raises(ValueError, match=f'{path} holds the label 7'):
        DataGuardHook().before_test(runner(loader(folder)))
    good = SimpleNamespace(dataset=[1])
    with pytest.raises(ValueError, match=f'{path} holds the label 7'):
        DataGuardHook().before_train(runner(good, val=loader(folder)))
    DataGuardHook(decode=False).before_train(runner(loader(folder)))


def test_the_names_are_those_of_the_config(folder):
    for path in (folder / 'images').iterdir():
        path.unlink()
    empty = loader(folder, serialize_data=False)
    for stage, call in (
        ('train', lambda hook: hook.before_train(runner(empty))),
        ('val', lambda hook: hook.before_train(
            runner(SimpleNamespace(dataset=[1]), empty))),
        ('test', lambda hook: hook.before_test(runner(empty))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf'^{stage}_dataloader\.dataset \('):
            call(DataGuardHook())


HEADS = {
    'decode_head': (dict(decode_head=head(1)), 'model.decode_head.num_classes=1'),
    'auxiliary_head': (
        dict(decode_head=head(), auxiliary_head=head(1)),
        'model.auxiliary_head.num_classes=1',
    ),
    'cascade': (
        dict(decode_head=nn.ModuleList([head(), head(1)])),
        r'model.decode_head\[1\].num_classes=1',
    ),
}


@pytest.mark.parametrize('case', HEADS)
def test_each_head_needs_an_output_a_class(folder, case):
    heads, words = HEADS[case]
    with pytest.raises(ValueError, match=f'has 2 classes and {words}'):
        DataGuardHook().before_train(runner(loader(folder), **heads))


def test_more_outputs_than_classes_are_fine(folder):
    DataGuardHook().before_train(runner(loader(folder), decode_head=head(19)))


class Wrapper(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


def test_heads_inside_of_test_time_augmentation(folder):
    run = runner(loader(folder), decode_head=head(1))
    run.model.test_step = None
    run.model = Wrapper(run.model)
    with pytest.raises(ValueError, match=r'model\.decode_head.num_classes=1'):
        DataGuardHook().before_test(run)


def test_the_label_to_ignore_is_what_all_heads_ignore(folder):
    path = pixel(folder, 9)
    DataGuardHook().before_train(runner(loader(folder), decode_head=head(2, 9)))
    both = dict(decode_head=head(2, 9), auxiliary_head=head(2, 255))
    with pytest.raises(ValueError, match=f'{path} holds the label 9 .* 0 to 1:'):
        DataGuardHook().before_train(runner(loader(folder), **both))


@pytest.mark.parametrize('rank', [0, 1])
def test_processes_share_the_work_and_the_error(folder, monkeypatch, rank):
    """What one finds ends all, with the same words."""
    told = []

    def gather(mine):
        told.append(mine)
        return [mine, theirs] if rank == 0 else [theirs, mine]

    for name, value in dict(
        get_rank=lambda: rank, get_world_size=lambda: 2, all_gather_object=gather
    ).items():
        monkeypatch.setattr(data_guard_hook, name, value)
    theirs = (Findings(2 if rank == 0 else 3), None)
    with logged() as said:
        DataGuardHook().before_train(runner(loader(folder)))
    assert [(f.label_maps, said) for f, said in told] == [(3 - rank, None)]
    assert any('Checked 5 label maps' in text for text in said)

    theirs = (Findings(), 'labels/1.png is bad')
    with pytest.raises(ValueError, match=r'^labels/1\.png is bad$'):
        DataGuardHook().before_train(runner(loader(folder)))

    # The other one is told, too, before this one ends.
    theirs = (Findings(), None)
    path = pixel(folder, 7, index=rank)
    with pytest.raises(ValueError, match=f'{path} holds the label 7'):
        DataGuardHook().before_train(runner(loader(folder)))
    assert told[-1][1] is None
    (problem,) = told[-1][0].problems
    assert problem.index == rank and str(path) in problem.said


def test_a_classification_head_with_too_few_outputs():
    """Labels count, not names: a part of ImageNet has the names of all of it."""
    dataset = SimpleNamespace(metainfo=dict(classes=tuple('abcd')), pipeline=())
    model = nn.Module()
    model.head = head(3)
    check_outputs(model, dataset, 'train_dataloader.dataset')
    check = SampleCheck(dataset, 'train_dataloader.dataset', **expected_labels(model))
    assert check.problem(0, dict(gt_label=2)) is None
    found = check.problem(1, dict(gt_label=3))
    assert 'gt_label=3, but labels are 0 to 2' in found.said


# Left out.


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(on_error='ignore'), "on_error must be one of .* got 'ignore'"),
        (dict(images='all'), "images must be one of .* got 'all'"),
        (dict(max_share=2), 'max_share must be between 0 and 1, got 2'),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        DataGuardHook(**options)


def skipping(run, **options):
    DataGuardHook(on_error='skip', max_share=0.5, **options).before_train(run)


def places(data):
    return [Path(item['img_path']).stem for item in data.dataset]


@pytest.mark.parametrize('rank', [0, 1])
def test_all_processes_leave_out_the_same(folder, tmp_path, monkeypatch, rank):
    """Each has found one of two, and the main one writes the list."""
    bad = [pixel(folder, 7, index=index) for index in (1, 2)]
    shares = [
        (
            examine(loader(folder).dataset, 'train_dataloader.dataset', share=(r, 2)),
            None,
        )
        for r in (0, 1)
    ]
    assert [len(found.problems) for found, _ in shares] == [1, 1]
    for name, value in dict(
        get_rank=lambda: rank,
        get_world_size=lambda: 2,
        all_gather_object=lambda mine: shares,
        is_main_process=lambda: rank == 0,
    ).items():
        monkeypatch.setattr(data_guard_hook, name, value)
    data = loader(folder)
    with logged() as said:
        skipping(runner(data, work_dir=tmp_path / 'work'))
    assert places(data) == ['0', '3', '3', '3', '4']
    (text,) = [text for text in said if 'cannot be used' in text]
    assert '2 of 5 training samples' in text and str(bad[0]) in text
    listed = tmp_path / 'work/skipped_files.txt'
    assert listed.exists() == (rank == 0)
    if rank == 0:
        lines = [line.split('\t')[0] for line in listed.read_text().splitlines()]
        assert lines == [str(folder / f'images/{index}.png') for index in (1, 2)]


def test_what_is_mended_is_used_again(folder, tmp_path):
    pixel(folder, 7, index=1)
    data = loader(folder)
    run = runner(data, work_dir=tmp_path)
    skipping(run)
    assert places(data) == ['0', '2', '2', '3', '4']
    pixel(folder, 1, index=1)
    skipping(run)
    assert places(data) == ['0', '1', '2', '3', '4']
    assert not (tmp_path / 'skipped_files.txt').exists()


def test_three_of_five_are_too_many(folder, tmp_path):
    for index in (1, 2, 3):
        pixel(folder, 7, index=index)
    with pytest.raises(ValueError, match='3 or more of the 5 samples of train_datal'):
        skipping(runner(loader(folder), work_dir=tmp_path))


def test_testing_leaves_nothing_out(folder):
    path = pixel(folder, 7)
    with pytest.raises(ValueError, match=f'{path} .* would be others'):
        DataGuardHook(on_error='skip').before_test(runner(loader(folder)))


def test_a_list_that_cannot_be_written_is_no_reason_to_stop(folder, tmp_path):
    pixel(folder, 7)
    (tmp_path / 'file').write_text('')
    with logged() as said:
        skipping(runner(loader(folder), work_dir=tmp_path / 'file/work'))
    assert any('skipped_files.txt could not be written' in text for text in said)


def test_what_goes_bad_later_is_told_once_a_doubling(folder, tmp_path):
    hook = DataGuardHook(on_error='skip', max_share=1)
    run = runner(loader(folder), work_dir=tmp_path)
    hook.before_train(run)
    with logged() as said:
        for number in (0, 1, 1, 2, 3):
            replaced = [(f'{number}.png', 'is bad')]
            sample = BaseDataElement(metainfo=dict(replaced_samples=replaced))
            hook.after_train_iter(run, 0, dict(data_samples=[sample]))
    counts = [text.split()[0] for text in said if 'since the training began' in text]
    assert counts == ['1', '2', '4']
    lines = (tmp_path / 'skipped_files.txt').read_text().splitlines()
    assert lines == [f'{number}.png\tis bad' for number in range(4)]


def test_a_long_look_tells_how_far_it_is(monkeypatch):
    logger, now = MMLogger.get_current_instance(), [0.0]
    monkeypatch.setattr(data_guard_hook.time, 'monotonic', lambda: now[0])
    progress = data_guard_hook._Progress(logger)
    with logged() as said:
        for second in range(61):
            now[0] = float(second)
            progress('train', second * 1000, 60000)
    assert said == [
        'Looked at 11,000 of 60,000 files of train so far, about 49 s more.',
        'Looked at 42,000 of 60,000 files of train so far, about 18 s more.',
    ]


class Eager:
    """As the iterator of mmengine's own loop, made before a hook is asked."""

    def __init__(self, loader):
        self.loader, self.batches = loader, iter(loader)


@pytest.mark.parametrize('persistent', [False, True])
def test_workers_that_have_begun_are_told(folder, tmp_path, persistent):
    """They hold copies of the data set, and have taken from the sampler."""
    data = loader(folder).dataset
    batches = DataLoader(
        data,
        batch_size=1,
        sampler=InfiniteSampler(data, shuffle=False),
        num_workers=1,
        persistent_workers=persistent,
        collate_fn=pseudo_collate,
    )
    run = runner(batches, work_dir=tmp_path)
    run.train_loop = SimpleNamespace(
        dataloader=batches, dataloader_iterator=Eager(batches)
    )
    assert next(run.train_loop.dataloader_iterator.batches)['img_path'] == [
        str(folder / 'images/0.png')
    ]
    pixel(folder, 7, index=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    skipping(run)
    assert torch.equal(torch.get_rng_state(), state)
    found = run.train_loop.dataloader_iterator.batches
    names = [Path(next(found)['img_path'][0]).stem for _ in range(6)]
    assert names == ['0', '2', '2', '3', '4', '0']
