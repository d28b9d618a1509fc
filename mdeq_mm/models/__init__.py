from .backbones import MDEQ
from .losses import ClassWeightedCrossEntropy
from .multi_task import MultiTaskDataPreprocessor, MultiTaskMDEQ
from .necks import MDEQFuseScales

__all__ = [
    'MDEQ',
    'ClassWeightedCrossEntropy',
    'MDEQFuseScales',
    'MultiTaskDataPreprocessor',
    'MultiTaskMDEQ',
]
