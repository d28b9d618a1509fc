"""What belongs to which task."""

import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from mmengine.structures import BaseDataElement

from mdeq_mm import tasks
from mdeq_mm.multi_task import (
    MultiTaskDataPreprocessor,
    MultiTaskDataset,
    MultiTaskMDEQ,
    MultiTaskMetric,
)


@pytest.mark.parametrize(
    ('fields', 'task'),
    [
        (dict(gt_label=1), 'cls'),
        (dict(gt_sem_seg=1), 'seg'),
        (dict(gt_label=1, gt_sem_seg=1), 'both'),
        (dict(), 'both'),
        (dict(gt_label=1, gt_sem_seg=1, task='seg'), 'seg'),
        (dict(gt_sem_seg=1, task='cls'), 'cls'),
    ],
)
def test_the_task_of_a_sample_is_its_mark_or_what_its_labels_tell(fields, task):
    assert tasks.task_of(fields) == task
    sample = BaseDataElement(metainfo={k: v for k, v in fields.items() if k == 'task'})
    sample.set_data({k: v for k, v in fields.items() if k != 'task'})
    assert tasks.task_of(sample) == task
    assert tasks.task_of(BaseDataElement(metainfo=fields)) == task


def test_which_samples_go_to_which_head():
    served = {(t, h) for t in tasks.SCOPES for h in tasks.LABELS if tasks.serves(t, h)}
    assert served == {('cls', 'cls'), ('seg', 'seg'), ('both', 'cls'), ('both', 'seg')}


def test_a_scope_that_is_written_is_kept():
    cfg = dict(type='ResNet')
    assert tasks.in_scope(cfg, 'cls') == dict(_scope_='mmpretrain', type='ResNet')
    assert tasks.in_scope(cfg, 'both') == dict(_scope_='mmseg', type='ResNet')
    cfg['_scope_'] = 'other'
    assert tasks.in_scope(cfg, 'seg') == cfg


@pytest.mark.parametrize('missing', ['mmpretrain', 'mmseg'])
@pytest.mark.parametrize(
    'build',
    [
        lambda: MultiTaskMDEQ(backbone=dict(), head=dict(), decode_head=dict()),
        MultiTaskDataPreprocessor,
        lambda: MultiTaskDataset(datasets=dict(cls=dict(), seg=dict())),
        MultiTaskMetric,
    ],
    ids=['model', 'preprocessor', 'dataset', 'metric'],
)
def test_a_missing_toolbox_is_named(monkeypatch, missing, build):
    monkeypatch.setattr(
        tasks, 'find_spec', lambda name: None if name == missing else object()
    )
    package = dict(mmpretrain='onedl-mmpretrain', mmseg='onedl-mmsegmentation')[missing]
    with pytest.raises(ImportError) as refused:
        build()
    said = str(refused.value)
    assert f'{missing} is not installed' in said and f'pip install {package}"' in said
    assert said.startswith('MultiTask')
