"""Joint training of one backbone for classification and segmentation."""

from .data_preprocessor import MultiTaskDataPreprocessor
from .dataset import MultiTaskDataset
from .multi_task_mdeq import MultiTaskMDEQ
from .multi_task_metric import MultiTaskMetric
from .multi_task_visualization_hook import MultiTaskSegVisualizationHook

__all__ = [
    'MultiTaskDataPreprocessor',
    'MultiTaskDataset',
    'MultiTaskMDEQ',
    'MultiTaskMetric',
    'MultiTaskSegVisualizationHook',
]
