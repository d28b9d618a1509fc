"""Our models under mmpretrain's own functions."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from mmengine.fileio import dump

from ..tasks import PACKAGES
from .index import INDEX, list_models, metafiles, zoo_root

#: Of the models that mmpretrain can build; others need mmseg's scope.
TASK = 'Image Classification'


def register_models():
    """Tell mmpretrain of the classifiers of this package.

    ``mmpretrain.get_model``, ``list_models`` and the inferencers then know their
    names, and those of the joint models. Calling it again does nothing.

    Raises:
        ImportError: If mmpretrain is not installed.
        ValueError: If it knows other models under these names.

    Example:
        >>> import mdeq_mm, mmpretrain
        >>> mdeq_mm.register_models()
        >>> mmpretrain.list_models('mdeq-digits')
        ['mdeq-digits']
    """
    if find_spec('mmpretrain') is None:
        raise ImportError(
            'register_models adds names to mmpretrain, which is not installed: run '
            f'"pip install {PACKAGES["mmpretrain"].split(" ")[0]}", or use '
            'mdeq_mm.get_model, which needs no registration'
        )
    from mmpretrain.apis import ModelHub

    names = list_models(task=TASK)
    known = [name for name in names if ModelHub.has(name)]
    if known == names:
        return
    if known:
        raise ValueError(
            f'mmpretrain knows other models called {", ".join(known)}: use '
            'mdeq_mm.get_model for those of this package'
        )
    # It reads an index from a file, and takes all that is in it.
    index = dict(Collections=[], Models=[])
    for metafile in metafiles():
        index['Collections'] += metafile['Collections']
        index['Models'] += [m for m in metafile['Models'] if m['Name'] in names]
    with TemporaryDirectory() as folder:
        path = Path(folder, INDEX)
        dump(index, path)
        ModelHub.register_model_index(path, config_prefix=zoo_root())
