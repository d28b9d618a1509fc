"""Metrics of two tasks are those that each toolbox would find alone."""

import os
from copy import deepcopy
from itertools import chain, zip_longest

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

import mmengine.evaluator.metric
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmpretrain.evaluation import Accuracy
from mmpretrain.structures import DataSample
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from torch import multiprocessing

from mdeq_mm.registry import METRICS

META = dict(
    classes=('ground', 'a', 'b'),
    tasks=dict(cls=dict(classes=tuple('0123')), seg=dict(classes=('ground', 'a', 'b'))),
)
# Odd numbers of both, so that two processes fill up their last batches.
NUMBERS = dict(cls=7, seg=4)


def predictions(cls=7, seg=4, both=0, seed=0):
    """Data samples with ground truth and predictions, each of which counts."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for task, number in (('cls', cls), ('seg', seg), ('both', both)):
        for _ in range(number):
            sample = DataSample() if task == 'cls' else SegDataSample()
            if task != 'seg':
                sample.gt_label = torch.randint(0, 4, (1,), generator=g)
                sample.pred_score = torch.rand(4, generator=g)
                sample.pred_label = sample.pred_score.argmax().reshape(1)
            if task != 'cls':
                sample.gt_sem_seg, sample.pred_sem_seg = (
                    PixelData(data=torch.randint(0, 3, (1, 6, 5), generator=g))
                    for _ in range(2)
                )
            sample.set_metainfo(dict(task=task))
            samples.append(sample)
    return samples


def evaluate(metric, samples, batch=3, meta=META):
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = meta
    for i in range(0, len(samples), batch):
        evaluator.process(data_samples=samples[i : i + batch], data_batch=None)
    return evaluator.evaluate(len(samples))


def expected(samples, topk=(1, 2)):
    found = evaluate(Accuracy(topk=topk), [s for s in samples if 'gt_label' in s])
    found = {f'cls/{k}': v for k, v in found.items()}
    scenes = [s for s in samples if 'gt_sem_seg' in s]
    seg = evaluate(IoUMetric(iou_metrics=['mIoU', 'mDice']), scenes)
    return found | {f'seg/{k}': v for k, v in seg.items()}


def build(**options):
    init_default_scope('mmseg')
    return METRICS.build(
        dict(
            type='MultiTaskMetric',
            cls=dict(type='Accuracy', topk=(1, 2)),
            seg=dict(type='IoUMetric', iou_metrics=['mIoU', 'mDice']),
        )
        | options
    )


@pytest.mark.parametrize('both', [0, 3])
@pytest.mark.parametrize('batch', [1, 4])
def test_values_are_those_of_each_metric_alone(both, batch):
    samples = predictions(both=both)
    # In mixed order.
    samples = samples[::2] + samples[1::2]
    metric = build()
    wanted = expected(samples)
    assert evaluate(metric, samples, batch) == wanted
    assert {'cls/accuracy/top1', 'cls/accuracy/top2', 'seg/mIoU', 'seg/mDice'} < set(
        wanted
    )
    # Nothing is left for the next evaluation.
    others = predictions(both=both, seed=1)
    assert evaluate(metric, others) == expected(others) != wanted


def test_several_metrics_of_a_task():
    samples = predictions(cls=9)
    metric = build(cls=[dict(type='Accuracy'), dict(type='SingleLabelMetric')])
    found = evaluate(metric, samples)
    assert found['cls/accuracy/top1'] == expected(samples)['cls/accuracy/top1']
    assert {'cls/single-label/precision', 'cls/single-label/recall'} < set(found)


def test_samples_without_labels_count_for_nothing():
    samples = predictions(both=2)
    wanted = expected(samples)
    for sample in predictions(cls=2, seg=2, seed=3):
        sample.pop('gt_label', None)
        sample.pop('gt_sem_seg', None)
        samples.insert(1, sample)
    assert evaluate(build(), samples) == wanted


@pytest.mark.parametrize('task', ['cls', 'seg'])
def test_a_task_without_samples_has_no_metrics(task):
    found = evaluate(build(), predictions(**(dict(cls=0, seg=0) | {task: 5})))
    assert found and all(key.startswith(f'{task}/') for key in found)


def test_images_with_both_labels_have_one_data_set():
    meta = dict(classes=('ground', 'a', 'b'), tasks=dict(both=META['tasks']['seg']))
    samples = predictions(cls=0, seg=0, both=5)
    assert evaluate(build(), samples, meta=meta) == expected(samples)


def shares(world):
    """Numbers of the samples that each process evaluates, as DefaultSampler deals."""
    dataset = range(sum(NUMBERS.values()))
    out = []
    for rank in range(world):
        sampler = DefaultSampler(dataset, shuffle=False)
        sampler.rank, sampler.world_size = rank, world
        sampler.num_samples = -(-len(dataset) // world)
        sampler.total_size = sampler.num_samples * world
        out.append(list(sampler))
    return out


@pytest.mark.parametrize('world', [2, 4])
def test_each_sample_counts_once_across_processes(monkeypatch, world):
    """Those that fill up the last batches are evaluated twice, and dropped."""
    samples = predictions(**NUMBERS)
    parts = shares(world)
    assert sum(map(len, parts)) == 12 > len(samples)

    collected = []
    for numbers in parts:
        metric = build()
        metric.dataset_meta = META
        for number in numbers:
            metric.process(None, [samples[number].to_dict()])
        collected.append(deepcopy(metric.results))

    def collect(results, size, *args, **kwargs):
        rows = chain.from_iterable(zip_longest(*collected))
        return [r for r in rows if r is not None][:size]

    wanted = expected(samples)
    monkeypatch.setattr(mmengine.evaluator.metric, 'collect_results', collect)
    assert metric.evaluate(len(samples)) == wanted


def evaluate_process(rank, folder):
    """What one of two processes does with its share of the samples."""
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    samples = predictions(**NUMBERS)
    metric = build()
    metric.dataset_meta = META
    for number in DefaultSampler(samples, shuffle=False):
        metric.process(None, [samples[number].to_dict()])
    assert len(metric.results) == 6
    torch.save(metric.evaluate(len(samples)), f'{folder}/{rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    multiprocessing.spawn(evaluate_process, (str(tmp_path),), nprocs=2)
    wanted = expected(predictions(**NUMBERS))
    for rank in (0, 1):
        assert torch.load(tmp_path / f'{rank}.pth', weights_only=False) == wanted
