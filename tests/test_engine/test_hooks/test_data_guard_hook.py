"""The hook that looks at the data before training, and who is asked to do it."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, init_default_scope
from PIL import Image
from torch import nn

pytest.importorskip('mmseg', reason='mmseg is not installed')
from mmengine.model import BaseTTAModel
from mmseg.datasets import BaseSegDataset

from mdeq_mm.engine import DataGuardHook
from mdeq_mm.engine.hooks import data_guard_hook
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


def runner(train, val=None, **model):
    module = nn.Module()
    for name, part in model.items():
        setattr(module, name, part)
    return SimpleNamespace(
        train_dataloader=train,
        val_loop=val,
        val_dataloader=val,
        test_dataloader=train,
        model=module,
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
    theirs = (2 if rank == 0 else 3, None)
    with logged() as said:
        DataGuardHook().before_train(runner(loader(folder)))
    assert told == [(3 if rank == 0 else 2, None)]
    assert any('Checked 5 label maps' in text for text in said)

    theirs = (0, 'labels/1.png is bad')
    with pytest.raises(ValueError, match=r'^labels/1\.png is bad$'):
        DataGuardHook().before_train(runner(loader(folder)))

    # The other one is told, too, before this one ends.
    path = pixel(folder, 7, index=rank)
    with pytest.raises(ValueError, match=f'{path} holds the label 7'):
        DataGuardHook().before_train(runner(loader(folder)))
    assert told[-1][0] == 0 and str(path) in told[-1][1]


def test_a_classification_head_with_too_few_outputs():
    """Of joint training: the labels would only be missed when they are drawn."""
    from types import SimpleNamespace

    from mdeq_mm.engine.hooks.data_guard_hook import _check_outputs

    dataset = SimpleNamespace(metainfo=dict(classes=tuple('abcd')))
    heads = {'model.head': SimpleNamespace(num_classes=3)}
    with pytest.raises(ValueError, match=r'4 classes and model\.head\.num_classes=3'):
        _check_outputs(heads, dataset, 'train_dataloader.dataset', segments=False)
    heads['model.head'].num_classes = 4
    _check_outputs(heads, dataset, 'train_dataloader.dataset', segments=False)
