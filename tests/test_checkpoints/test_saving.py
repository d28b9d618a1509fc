"""Files that are whole at every moment."""

import copy
import os
import pickle

import pytest
import torch
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.runner import find_latest_checkpoint

from mdeq_mm.checkpoints.saving import (
    ATOMIC,
    WHOLE,
    AtomicLocalBackend,
    KeepUntilWritten,
    find_resumable,
    is_whole,
    mend_pointer,
    point_to,
    remove_partial,
)


@pytest.fixture
def backend():
    return get_file_backend('x', backend_args=dict(backend=ATOMIC))


def test_backend_writes_what_it_is_given(backend, tmp_path):
    assert isinstance(backend, AtomicLocalBackend)
    path = tmp_path / 'new' / 'a.pth'
    backend.put(b'one', path)
    backend.put(b'two', str(path))
    assert path.read_bytes() == b'two'
    backend.put_text('drei ä', path)
    assert path.read_text(encoding='utf-8') == 'drei ä'
    assert os.listdir(path.parent) == ['a.pth']


def test_a_file_is_never_half_there(backend, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    backend.put(b'old', path)

    def fail(*args):
        raise OSError('no space left')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='no space left'):
        backend.put(b'new', path)
    assert path.read_bytes() == b'old'
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == ['a.pth']


def test_removal_waits(tmp_path):
    backend = KeepUntilWritten(LocalBackend())
    old, new, folder = tmp_path / 'old', tmp_path / 'new', tmp_path / 'folder'
    for path in (old, new):
        path.write_text('x')
    folder.mkdir()
    backend.remove(str(old))
    backend.remove(str(new))
    backend.rmtree(str(folder))
    assert backend.isfile(old) and folder.is_dir()
    # One that was written again under the same name stays.
    backend.flush(keep={str(new)})
    assert os.listdir(tmp_path) == ['new']
    backend.flush()
    assert os.listdir(tmp_path) == ['new']


def save(path, cut=None):
    torch.save(dict(state_dict={}), path)
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def test_finds_what_the_pointer_names(tmp_path):
    save(tmp_path / 'epoch_2.pth')
    newer = save(tmp_path / 'epoch_1.pth')
    point_to(tmp_path, newer)
    assert find_resumable(tmp_path) == (str(newer), None)


def test_finds_nothing_in_a_new_folder(tmp_path):
    assert find_resumable(tmp_path) == (None, None)
    assert find_resumable(tmp_path / 'absent') == (None, None)


@pytest.mark.parametrize('pointer', ['', 'epoch_3.pth', 'absent.pth', None])
def test_takes_the_newest_whole_one(pointer, tmp_path):
    """The pointer is empty, names half a file or none, or is not there."""
    save(tmp_path / 'epoch_3.pth', cut=400)
    paths = [save(tmp_path / f'iter_{n}.pth') for n in (9, 10)]
    save(tmp_path / 'best_x_iter_11.pth')
    for age, path in enumerate(paths):
        os.utime(path, ns=(age, age))
    if pointer is not None:
        point_to(tmp_path, tmp_path / pointer if pointer else '')
    path, said = find_resumable(tmp_path)
    assert path == str(paths[1])
    assert 'last_checkpoint' in said and 'iter_10.pth' in said


def test_a_folder_may_be_moved(tmp_path):
    path = save(tmp_path / 'epoch_1.pth')
    point_to(tmp_path, '/somewhere/else/epoch_1.pth')
    found, said = find_resumable(tmp_path)
    assert found == str(path) and '/somewhere/else' in said
    # The loop reads the pointer itself.
    assert mend_pointer(tmp_path) == (found, said)
    assert find_latest_checkpoint(tmp_path) == str(path)
    assert mend_pointer(tmp_path) == (str(path), None)


def test_a_second_pointer_is_always_whole(tmp_path):
    """Wherever checkpoints are, and whatever they are called."""
    path = save(tmp_path / 'latest.ckpt')
    folder = tmp_path / 'work'
    point_to(folder, '')
    point_to(folder, path, WHOLE)
    found, said = mend_pointer(folder)
    assert found == str(path) == find_latest_checkpoint(folder)
    assert 'last_checkpoint' in said


def test_remote_files_are_left_alone(tmp_path):
    point_to(tmp_path, 's3://bucket/epoch_1.pth')
    assert find_resumable(tmp_path) == ('s3://bucket/epoch_1.pth', None)


def test_says_that_nothing_is_whole(tmp_path):
    save(tmp_path / 'epoch_1.pth', cut=10)
    point_to(tmp_path, tmp_path / 'epoch_1.pth')
    with pytest.raises(FileNotFoundError, match=r'epoch_1\.pth.*no whole file'):
        find_resumable(tmp_path)


def test_tells_whole_files_from_others(tmp_path):
    path = save(tmp_path / 'a.pth')
    assert is_whole(path)
    size = path.stat().st_size
    for cut in (0, 1, size // 2, size - 1):
        assert not is_whole(save(path, cut))
    assert not is_whole(tmp_path)


def test_a_backend_that_keeps_files_can_be_copied():
    for copied in (copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))):
        backend = copied(KeepUntilWritten(LocalBackend()))
        assert backend.join_path('a', 'b') == 'a/b'
