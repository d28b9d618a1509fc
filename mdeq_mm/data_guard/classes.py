"""Whether the classes of a data set are named as its folders are numbered."""

from .datasets import leaves


def check_class_order(dataset, name):
    """Refuse class names in another order than that of the folders.

    mmpretrain numbers the folders of a ``CustomDataset`` in alphabetical order and
    compares no names. Names that are no folders are left alone: they may be nicer ones.

    Args:
        dataset (Dataset): The data set; wrappers are looked into.
        name (str): How the config names it.

    Raises:
        ValueError: If a folder's own name stands at the place of another one.
    """
    for path, part in leaves(dataset, name):
        folders = getattr(part, 'folder_to_idx', None) or {}
        classes = getattr(part, 'metainfo', {}).get('classes') or ()
        for folder, index in folders.items():
            if folder in classes and tuple(classes).index(folder) != index:
                raise ValueError(
                    f'{path}.metainfo.classes={tuple(classes)} names the images of the '
                    f'folder {folder!r} {classes[index]!r}: folders are numbered in '
                    f'alphabetical order, so give the names as {tuple(sorted(folders))}'
                )
