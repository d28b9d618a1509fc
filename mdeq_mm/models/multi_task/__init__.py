from .data_preprocessor import MultiTaskDataPreprocessor
from .multi_task_mdeq import MultiTaskMDEQ

__all__ = ['MultiTaskDataPreprocessor', 'MultiTaskMDEQ']
