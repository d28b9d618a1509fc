"""Files that are whole under their own name at every moment."""

import os
import zipfile
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import find_latest_checkpoint

#: Name of :class:`AtomicLocalBackend` in ``backend_args=dict(backend=...)``.
ATOMIC = 'mdeq_mm.atomic'
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
        where that is not whole, as when its writer was killed, the newest one that
        is, and a sentence that says so. None where there is no checkpoint.

    Raises:
        FileNotFoundError: If ``last_checkpoint`` names a file that is not whole, and
            no other one is.
    """
    folder = Path(work_dir)
    pointer = folder / 'last_checkpoint'
    said = f'{pointer} is missing'
    if pointer.is_file():
        named = find_latest_checkpoint(str(folder)) or ''
        # A folder that was moved, or a file system that is not looked into.
        for path in (named, folder / Path(named).name):
            if '://' in str(path) or is_whole(path):
                return str(path), None
        said = f'{pointer} names {named!r}, which is no whole file'
    # Those of the best results hold no state of the optimiser.
    names = [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]
    whole = [path for path in names if is_whole(path)]
    if whole:
        newest = max(whole, key=lambda path: path.stat().st_mtime_ns)
        return str(newest), f'{said}; {newest} is the newest checkpoint that is whole'
    if pointer.is_file():
        raise FileNotFoundError(
            f'{said}, and no other checkpoint is there: name one (load_from, or '
            '--resume CHECKPOINT), or remove last_checkpoint to start anew'
        )
    return None, None


def point_to(work_dir, path):
    """Let ``last_checkpoint`` name a checkpoint.

    Args:
        work_dir (str | Path): Of the training.
        path (str | Path): The checkpoint.
    """
    AtomicLocalBackend().put_text(str(path), Path(work_dir) / 'last_checkpoint')
