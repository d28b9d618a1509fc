"""Evaluation of two tasks, each by its own metrics."""

from mmengine.evaluator import BaseMetric

from ..registry import METRICS
from ..tasks import LABELS, in_scope, require_toolboxes, serves, task_of


@METRICS.register_module()
class MultiTaskMetric(BaseMetric):
    """Metrics of each task, over the samples that are labelled for it.

    Results carry the task in front: ``cls/accuracy/top1``, ``seg/mIoU``. Each
    sample of :class:`MultiTaskDataset` has one entry here whatever its task, so
    that collecting across processes drops exactly those that fill up the last
    batches.

    Args:
        cls (dict | list[dict]): Metrics of mmpretrain.
        seg (dict | list[dict]): Metrics of mmseg.
        collect_device (str): ``'cpu'`` or ``'gpu'``.

    Raises:
        ImportError: If mmpretrain or mmseg is not installed.
    """

    def __init__(
        self,
        cls=dict(type='Accuracy'),
        seg=dict(type='IoUMetric', iou_metrics=['mIoU']),
        collect_device='cpu',
    ):
        super().__init__(collect_device)
        require_toolboxes(type(self).__name__)
        self.metrics = {
            task: [
                METRICS.build(in_scope(cfg, task))
                for cfg in (cfgs if isinstance(cfgs, list | tuple) else [cfgs])
            ]
            for task, cfgs in (('cls', cls), ('seg', seg))
        }

    @property
    def dataset_meta(self):
        """Meta information of the data set (a dict), or None."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta):
        self._dataset_meta = meta
        tasks = meta.get('tasks', {})
        for task, metrics in self.metrics.items():
            for metric in metrics:
                metric.dataset_meta = tasks.get(task, tasks.get('both', meta))

    def process(self, data_batch, data_samples):
        """Take in the predictions of one batch.

        Args:
            data_batch (dict): The batch.
            data_samples (Sequence[dict]): Predictions and ground truth.
        """
        for sample in data_samples:
            entry = {}
            for task, metrics in self.metrics.items():
                if serves(task_of(sample), task) and LABELS[task] in sample:
                    entry[task] = [_results(m, data_batch, sample) for m in metrics]
            self.results.append(entry)

    def compute_metrics(self, results):
        """Compute all metrics.

        Args:
            results (list[dict]): What :meth:`process` made of each sample.

        Returns:
            dict[str, float]: ``<task>/<name of the metric>`` to value.
        """
        found = {}
        for task, metrics in self.metrics.items():
            entries = [entry[task] for entry in results if task in entry]
            if not entries:
                continue
            for i, metric in enumerate(metrics):
                own = metric.compute_metrics([r for entry in entries for r in entry[i]])
                prefix = f'{metric.prefix}/' if metric.prefix else ''
                found |= {f'{task}/{prefix}{k}': v for k, v in own.items()}
        return found


def _results(metric, data_batch, sample):
    metric.results.clear()
    metric.process(data_batch, [sample])
    return list(metric.results)
