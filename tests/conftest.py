"""Fixtures that any test may use."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mdeq_mm.compat import installed_versions
from tests.safe_loading import taken_back

# No window opens where a test draws.
os.environ.setdefault('MPLBACKEND', 'Agg')

# How long an example takes depends on the machine; which ones are tried must not.
settings.register_profile('repeatable', deadline=None, derandomize=True)
settings.load_profile('repeatable')


# Files that take minutes, and start first, so that no process is left alone with one.
LONGEST = (
    'test_bash_blocks',
    'test_digits_demo',
    'test_benchmark',
    'test_every_config',
)


def pytest_collection_modifyitems(items):
    """Put the longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_report_header():
    """Say what is tested, for a reader of the log."""
    packages = ', '.join(f'{name} {v}' for name, v in installed_versions().items())
    return f'packages: {packages}; {torch.get_num_threads()} threads'


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random numbers, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def loading_of_module():
    """Leave a file as it was found, whatever its shared fixtures load."""
    with taken_back():
        yield


@pytest.fixture(autouse=True)
def loading_of_test():
    """Leave a test as it was found: trainings change how checkpoints are read."""
    with taken_back():
        yield


@pytest.fixture(scope='session')
def repo_root():
    """Root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def shared_dir(repo_root):
    """Folder with the reference data that lies beside the repository."""
    folder = repo_root.parent / 'shared'
    if not folder.is_dir():
        pytest.skip('the folder ../shared with the reference data is not there')
    return folder
