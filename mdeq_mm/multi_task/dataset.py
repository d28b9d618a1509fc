"""Two data sets as one."""

import numpy as np
from torch.utils.data import Dataset

from ..implicit.checks import check_int
from ..registry import DATASETS
from ..tasks import SCOPES, in_scope, require_toolboxes


@DATASETS.register_module()
class MultiTaskDataset(Dataset):
    """Classification and segmentation data sets as one, for joint training.

    Each has its own toolbox's pipeline, and marks its data samples with the task.
    In training an item holds samples of each, so that every batch has all tasks in
    it, and shorter data sets are repeated; in evaluation an item is one sample of
    one, each exactly once, in the order of the data sets.

    Data sets are often sorted by class, and a sampler shuffles items, not what is in
    them: for training, each data set is read in a shuffled order, the same in every
    epoch and process.

    Args:
        datasets (dict[str, dict]): Data sets of ``cls`` (of mmpretrain), ``seg``
            (of mmseg), and ``both``: one of mmseg whose samples carry a class too,
            by ``gt_label`` among the ``meta_keys`` of ``PackSegInputs``.
        pair (bool): Whether an item holds samples of each; False for evaluation.
        counts (dict[str, int], optional): How many samples of each a training
            item holds. Default: one.

    Raises:
        ImportError: If mmpretrain or mmseg is not installed.
        TypeError: If ``datasets`` is no dict of configs, or a count no integer.
        ValueError: If a task is unknown, a count below 1, or a data set empty.
    """

    def __init__(self, datasets, pair=True, counts=None):
        require_toolboxes(type(self).__name__)
        if not hasattr(datasets, 'items') or not datasets:
            raise TypeError(
                'datasets must be a dict from task to the config of a data set, such '
                f'as dict(cls=..., seg=...), got {datasets!r}'
            )
        for field, given, known in (
            ('datasets', datasets, SCOPES),
            ('counts', counts or {}, datasets),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(
                    f'{field} has the unknown task {unknown[0]!r}: use {sorted(known)}'
                )
        self.pair = pair
        self.counts = dict.fromkeys(datasets, 1) | dict(counts or {})
        for task, count in self.counts.items():
            check_int(f'counts[{task!r}]', count, 1)
        self.datasets = {task: _build(task, cfg) for task, cfg in datasets.items()}
        for task, dataset in self.datasets.items():
            if len(dataset) == 0:
                raise ValueError(
                    f'datasets[{task!r}] ({type(dataset).__name__}) has no samples: '
                    'check its data_root and data_prefix'
                )
        if pair:
            self.orders = {
                task: np.random.RandomState(0).permutation(len(dataset))
                for task, dataset in self.datasets.items()
            }

    @property
    def metainfo(self):
        """dict: That of the segmentation, and of each task under ``tasks``."""
        tasks = {task: dict(d.metainfo) for task, d in self.datasets.items()}
        return dict(tasks.get('seg') or tasks.get('both') or {}, tasks=tasks)

    def __len__(self):
        if not self.pair:
            return sum(len(dataset) for dataset in self.datasets.values())
        return max(-(-len(d) // self.counts[t]) for t, d in self.datasets.items())

    def __getitem__(self, index):
        """Item of the two data sets.

        Returns:
            dict: ``inputs`` and ``data_samples``: each a list of as many as
            ``counts`` says of each task in training, or one entry itself.
        """
        if self.pair:
            if not 0 <= index < len(self):
                raise IndexError(f'index {index} is out of range of {len(self)} items')
            items = [
                self._item(task, order[(index * self.counts[task] + k) % len(order)])
                for task, order in self.orders.items()
                for k in range(self.counts[task])
            ]
            return {k: [i[k] for i in items] for k in ('inputs', 'data_samples')}
        at = index
        for task, dataset in self.datasets.items():
            if 0 <= at < len(dataset):
                return self._item(task, at)
            at -= len(dataset)
        raise IndexError(f'index {index} is out of range of {len(self)} samples')

    def _item(self, task, index):
        item = self.datasets[task][int(index)]
        item['data_samples'].set_metainfo(dict(task=task))
        return item

    def __repr__(self):
        parts = ', '.join(f'{task}: {len(d)}' for task, d in self.datasets.items())
        return f'{type(self).__name__}({parts}, pair={self.pair})'


def _build(task, cfg):
    try:
        return DATASETS.build(in_scope(cfg, task))
    except ValueError as error:
        # So end data sets that find nothing, mostly, and do not say which.
        raise ValueError(
            f'datasets[{task!r}] ({cfg.get("type")}) cannot be read ({error}): check '
            'that there are samples where its data_root and data_prefix lead'
        ) from error
