"""Processes that have more to do than others."""

from types import SimpleNamespace

import pytest
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from mdeq_mm.data_guard import check_processes_agree, processes


def loop(cls, samples=6):
    """A loop in batches of two, without a runner."""
    made = cls.__new__(cls)
    made.dataloader = DataLoader(list(range(samples)), batch_size=2)
    return made


@pytest.fixture
def beside(monkeypatch):
    """Let another process say what it has."""

    def say(theirs):
        monkeypatch.setattr(processes, 'all_gather_object', lambda mine: [mine, theirs])

    return say


def test_processes_that_agree(beside):
    beside((6, 3))
    check_processes_agree(loop(EpochBasedTrainLoop), 'train_dataloader')
    # Nothing to count.
    check_processes_agree(SimpleNamespace(), 'train_dataloader')
    check_processes_agree(None, 'train_dataloader')


def test_more_batches_than_others_have(beside):
    beside((6, 4))
    said = r'3 to 4 batches an epoch.*train_dataloader\.sampler\.round_up=True'
    with pytest.raises(ValueError, match=said):
        check_processes_agree(loop(EpochBasedTrainLoop), 'train_dataloader')
    # It begins anew where its data end.
    check_processes_agree(loop(IterBasedTrainLoop), 'train_dataloader')


def test_other_files_than_others_have(beside):
    beside((8, 3))
    with pytest.raises(ValueError, match=r'val_dataloader\.dataset, 6 to 8'):
        check_processes_agree(loop(IterBasedTrainLoop), 'val_dataloader')
