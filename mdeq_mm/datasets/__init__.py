from .multi_task import MultiTaskDataset

__all__ = ['MultiTaskDataset']
