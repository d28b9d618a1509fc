"""Copies of the repository, one for each page that is tried."""

import shutil

import pytest

from tests.docs.sandbox import Sandbox, write_data


@pytest.fixture(scope='session')
def page_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('page_data') / 'sets')


@pytest.fixture
def sandbox(page_data, tmp_path_factory):
    """A function that makes the copy for a page."""
    made = []

    def make(page):
        made.append(tmp_path_factory.mktemp('page'))
        return Sandbox(made[-1] / 'mdeq_mm', page_data, page)

    yield make
    # Checkpoints of a large model are large.
    for folder in made:
        shutil.rmtree(folder)
