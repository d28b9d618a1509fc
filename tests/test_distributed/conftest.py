"""Two processes that talk over gloo, started once for all tests here."""

import pytest
import torch
from torch import multiprocessing

from . import jobs
from .models import contractive_weights


@pytest.fixture(scope='package')
def weights():
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    return contractive_weights()


@pytest.fixture(scope='package')
def found(weights, tmp_path_factory):
    """list[dict]: What each process found; see :func:`jobs.process`."""
    folder = tmp_path_factory.mktemp('two')
    torch.save(weights, folder / 'weights.pth')
    multiprocessing.spawn(jobs.process, (str(folder),), nprocs=2)
    return [torch.load(folder / f'{r}.pth', weights_only=False) for r in (0, 1)]
