"""Which models there are: what the metafiles say, and where the files lie.

They are read when the first name is looked up, not on import.
"""

import difflib
import fnmatch
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from mmengine.fileio import load
from mmengine.runner.checkpoint import CheckpointLoader

from ..checkpoints import load_from_local

INDEX = 'model-index.yml'
#: What addresses of weights that come with the package begin with; a path follows,
#: relative to the folder of the index.
SCHEME = 'mdeq_mm://'


@dataclass(frozen=True)
class Entry:
    """A model of a metafile.

    Attributes:
        name (str): Its name.
        config (str): Config file, relative to the folder of the index.
        weights (str | None): Address of its weights, where some are published.
        tasks (tuple[str, ...]): Such as ``'Image Classification'``.
    """

    name: str
    config: str
    weights: str | None = None
    tasks: tuple = ()

    @property
    def names(self):
        """set[str]: What it can be called: its name, or the stem of its config."""
        return {self.name, PurePosixPath(self.config).stem}


def zoo_root():
    """The folder that index, configs and tools are in.

    Returns:
        Path: ``.mim`` within an installed package, else the root of the checkout.

    Raises:
        FileNotFoundError: If there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    folders = (package / '.mim', package.parent)
    for folder in folders:
        if (folder / INDEX).is_file():
            return folder
    raise FileNotFoundError(
        f'{INDEX} is neither in {folders[0]} nor in {folders[1]}: install mdeq_mm '
        'from its wheel, or from a checkout with "pip install -e . --no-deps '
        '--no-build-isolation"'
    )


@cache
def metafiles():
    """What the metafiles say.

    Returns:
        list[dict]: ``Collections`` and ``Models`` of each. Not to be changed.
    """
    root = zoo_root()
    return [load(root / path) for path in load(root / INDEX)['Import']]


@cache
def entries():
    """All models of the metafiles.

    Returns:
        dict[str, Entry]: By name, in the order of the metafiles.
    """
    found = {}
    for metafile in metafiles():
        for model in metafile['Models']:
            tasks = model['Metadata']['Task']
            found[model['Name']] = Entry(
                name=model['Name'],
                config=model['Config'],
                weights=model.get('Weights'),
                tasks=tuple([tasks] if isinstance(tasks, str) else tasks),
            )
    return found


def find_entry(name):
    """Look a model up.

    Args:
        name (str): Name of a model, stem of its config file, or path of a config
            relative to the shipped ones, with or without ``configs/`` in front. A
            path to a config file of one's own is taken too.

    Returns:
        Entry: With a ``config`` that exists; of a file of one's own that is an
        absolute path.

    Raises:
        TypeError: If ``name`` is no text or path.
        ValueError: If there is no such model.
    """
    if not isinstance(name, str | Path):
        raise TypeError(
            f'name={name!r} is of type {type(name).__name__}: give the name of a '
            'model, such as mdeq_mm.list_models() returns'
        )
    text = str(name)
    models = entries().values()
    if text.endswith('.py'):
        config = PurePosixPath('configs', text.removeprefix('configs/'))
        for entry in models:
            if entry.config == str(config):
                return entry
        # Of _base_, to build one's own on; or a file elsewhere.
        for path in (zoo_root() / config, Path(text).expanduser()):
            if path.is_file():
                return Entry(name=path.stem, config=str(path.resolve()))
    else:
        for entry in models:
            if text.lower() in entry.names:
                return entry
    close = similar(text)
    hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
    raise ValueError(
        f'{text!r} is no model of mdeq_mm: {hint}mdeq_mm.list_models() returns all '
        'names'
    )


def similar(text):
    """What may have been meant by a name, or path of a config, that is none.

    Args:
        text (str): The name.

    Returns:
        list[str]: Up to three names, or paths of configs.
    """
    models = entries().values()
    if text.endswith('.py'):
        config = str(PurePosixPath('configs', text.removeprefix('configs/')))
        return difflib.get_close_matches(config, [e.config for e in models], cutoff=0.5)
    known = sorted(set().union(*(e.names for e in models)))
    return _close_names(text.lower(), known)


def _close_names(text, known):
    """Names that begin alike, and those that are spelt alike."""
    alike = difflib.get_close_matches(text, known, cutoff=0.5)
    begin = [name for name in known if text and name.startswith(text)]
    return list(dict.fromkeys(begin[:3] + alike))[:3]


def config_path(name):
    """Where the config of a model lies, such as for ``_base_`` of another one.

    Args:
        name (str): As for :func:`get_model`; files below ``_base_`` are found too.

    Returns:
        str: Absolute path.

    Raises:
        ValueError: If there is no such model.
    """
    return str(zoo_root() / find_entry(name).config)


def list_models(pattern=None, task=None, pretrained=False):
    """Names of the models that come with the package.

    Args:
        pattern (str, optional): What names have to match, with ``*`` and ``?``;
            anything may follow, as in mmpretrain.
        task (str, optional): ``'Image Classification'`` or ``'Semantic
            Segmentation'``, in any case. A model of both tasks is in both lists.
        pretrained (bool): Whether only models are wanted whose weights are
            published.

    Returns:
        list[str]: Sorted.

    Raises:
        ValueError: If no model is of such a task.

    Example:
        >>> import mdeq_mm
        >>> mdeq_mm.list_models('mdeq-xl')
        ['mdeq-xl_8xb32-100e_in1k', 'mdeq-xl_official_8xb32-100e_in1k']
    """
    models = entries().values()
    tasks = sorted(set().union(*(e.tasks for e in models)))
    if task is not None and task.lower() not in map(str.lower, tasks):
        raise ValueError(
            f'task={task!r} is unknown: use {" or ".join(map(repr, tasks))}'
        )
    return sorted(
        entry.name
        for entry in models
        if any(fnmatch.fnmatch(n, f'{pattern or ""}*'.lower()) for n in entry.names)
        and (task is None or task.lower() in map(str.lower, entry.tasks))
        and (entry.weights or not pretrained)
    )


def weights_path(address):
    """The file behind an address of weights that come with the package.

    Args:
        address (str): Such as ``'mdeq_mm://configs/demo/checkpoints/x.pth'``.

    Returns:
        str: Absolute path, whether the file is there or not.

    Raises:
        ValueError: If the address is of another kind, or leads out of the package.
    """
    root = zoo_root()
    path = (root / address.removeprefix(SCHEME)).resolve()
    if not address.startswith(SCHEME) or not path.is_relative_to(root.resolve()):
        raise ValueError(
            f'{address!r} is no address of weights of mdeq_mm: it has to begin with '
            f'{SCHEME}configs/'
        )
    return str(path)


# Importing this tells mmengine of the scheme, so that load_from, init_cfg and the
# toolboxes' inferencers take such addresses. It logs the name after 'load_from_'.
@CheckpointLoader.register_scheme(SCHEME, force=True)
def load_from_mdeq_mm(filename, map_location=None):
    """Read weights that come with the package, for mmengine's ``CheckpointLoader``.

    Args:
        filename (str): Address; see :func:`weights_path`.
        map_location (str, optional): Same as :func:`torch.load`.

    Returns:
        dict: The whole checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint.
    """
    return load_from_local(weights_path(filename), map_location)
