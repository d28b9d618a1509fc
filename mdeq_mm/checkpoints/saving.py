"""Files that are whole under their own name at every moment."""

import os
import zipfile
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import find_latest_checkpoint

#: Name of :class:`AtomicLocalBackend` in ``backend_args=dict(backend=...)``.
ATOMIC = 'mdeq_mm.atomic'
#: File that names the last checkpoint, as ``CheckpointHook`` writes it, in place.
POINTER = 'last_checkpoint'
#: One that is always whole.
WHOLE = 'last_whole_checkpoint'
#: What the names of files end with that are being written.
PARTIAL = '.partial'


@register_backend(ATOMIC)
class AtomicLocalBackend(LocalBackend):
    """Local files that are written beside their place and then put there.

    Whoever is killed meanwhile leaves the old file under the name, or none.
    """

    def put(self, obj, filepath):
        """Write bytes to a file, creating its folder where it is missing.

        Args:
            obj (bytes): The content.
            filepath (str | Path): Where to.
        """
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with open(partial, 'wb') as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync(path.parent)

    def put_text(self, obj, filepath, encoding='utf-8'):
        """Write a text to a file; see :meth:`put`."""
        self.put(obj.encode(encoding), filepath)


def _sync(folder):
    """Make names in a folder durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


class KeepUntilWritten:
    """File backend that removes files only once what replaces them is there.

    ``CheckpointHook`` removes the oldest checkpoint before it writes the new one.

    Args:
        backend: The file backend to work with; all but removing is its own.
    """

    def __init__(self, backend):
        self._backend = backend
        self._outdated = {}

    def __getattr__(self, name):
        # While it is copied or unpickled it has no backend yet.
        if name == '_backend':
            raise AttributeError(name)
        return getattr(self._backend, name)

    def remove(self, filepath):
        """Remove a file, later."""
        self._outdated[str(filepath)] = self._backend.remove

    def rmtree(self, dir_path):
        """Remove a folder, later."""
        self._outdated[str(dir_path)] = self._backend.rmtree

    def flush(self, keep=()):
        """Remove what was to be removed.

        Args:
            keep (Collection[str]): Paths that have been written anew since.
        """
        outdated, self._outdated = self._outdated, {}
        for path, remove in outdated.items():
            if path not in keep:
                remove(path)


def remove_partial(folder):
    """Remove what writers left in a folder that were killed.

    Args:
        folder (str | Path): Where checkpoints are written.
    """
    for path in Path(folder).glob(f'*.pth{PARTIAL}'):
        path.unlink(missing_ok=True)


def is_whole(path):
    """Whether a checkpoint is there, down to its end.

    A file of ``torch.save`` is a ZIP archive, whose directory is at its end.
    """
    path = Path(path)
    return path.is_file() and path.stat().st_size > 0 and zipfile.is_zipfile(path)


def find_resumable(work_dir):
    """The checkpoint that a training can resume from.

    Args:
        work_dir (str | Path): Of the training.

    Returns:
        tuple[str | None, str | None]: The checkpoint that ``last_checkpoint`` names;
        where that is not whole, as when its writer was killed, the last one that is,
        and a sentence that says so. None where there is no checkpoint.

    Raises:
        FileNotFoundError: If ``last_checkpoint`` names a file that is not whole, and
            no other one is.
    """
    folder = Path(work_dir)
    pointer = folder / POINTER
    said = f'{pointer} is missing'
    if pointer.is_file():
        named = find_latest_checkpoint(str(folder)) or ''
        if '://' in named or is_whole(named):
            return named, None
        said = f'{pointer} names {named!r}, which is no whole file'
    for path in _candidates(folder):
        if is_whole(path):
            return str(path), f'{said}; {path} is the last checkpoint that is whole'
    if pointer.is_file():
        raise FileNotFoundError(
            f'{said}, and no other checkpoint is there: name one (load_from, or '
            '--resume CHECKPOINT), or remove last_checkpoint to start anew'
        )
    return None, None


def _candidates(folder):
    """Where a checkpoint may be that is whole, best first."""
    for name in (POINTER, WHOLE):
        if (folder / name).is_file():
            named = Path((folder / name).read_text().strip())
            # In its own place, or in a folder that was moved.
            yield from (named, folder / named.name)
    # Those of the best results hold no state of the optimiser.
    names = [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]
    yield from sorted(names, key=lambda path: -path.stat().st_mtime_ns)


def mend_pointer(work_dir):
    """Let ``last_checkpoint`` name a checkpoint that can be resumed from.

    For all processes at once.

    Args:
        work_dir (str | Path): Of the training.

    Returns:
        tuple[str | None, str | None]: As of :func:`find_resumable`.

    Raises:
        FileNotFoundError: As there, in all processes.
    """
    found = [None, None, None]
    if is_main_process():
        try:
            path, said = find_resumable(work_dir)
            if said is not None:
                point_to(work_dir, path)
            found = [path, said, None]
        except FileNotFoundError as error:
            found[2] = str(error)
    broadcast_object_list(found)
    path, said, error = found
    if error is not None:
        raise FileNotFoundError(error)
    return path, said


def point_to(work_dir, path, name=POINTER):
    """Let a file of a work folder name a checkpoint.

    Args:
        work_dir (str | Path): Of the training.
        path (str | Path): The checkpoint.
        name (str): :data:`POINTER` or :data:`WHOLE`.
    """
    AtomicLocalBackend().put_text(str(path), Path(work_dir) / name)
