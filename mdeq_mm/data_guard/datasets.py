"""Looks at the samples of data sets, and tells which cannot be trained on."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from .findings import Findings, Problem
from .samples import SampleCheck

# So many samples make a task of a thread.
_CHUNK = 256


def leaves(dataset, name='dataset'):
    """Data sets inside of wrappers such as ``ConcatDataset``.

    Args:
        dataset (Dataset): A data set or a wrapper of some.
        name (str): How a config names it.

    Yields:
        tuple[str, Dataset]: Name and data set.
    """
    inner = getattr(dataset, 'datasets', None)
    if isinstance(inner, dict):
        for key, part in inner.items():
            yield from leaves(part, f'{name}.datasets.{key}')
    elif inner is not None:
        for i, part in enumerate(inner):
            yield from leaves(part, f'{name}.datasets[{i}]')
    elif hasattr(dataset, 'dataset'):
        yield from leaves(dataset.dataset, f'{name}.dataset')
    else:
        yield name, dataset


def check_dataset(dataset, name, **options):
    """Check that a data set has samples, and that all can be used.

    Args:
        dataset (Dataset): The data set; wrappers are looked into.
        name (str): How the config names it, for messages.
        **options: Of :func:`examine`.

    Returns:
        int: Number of label maps that were checked.

    Raises:
        FileNotFoundError: If an image or label map is missing.
        ValueError: If a data set is empty, a file is damaged, or a label map or
            label does not fit.
    """
    found = examine(dataset, name, most=lambda samples: 0, **options)
    if found.problems:
        raise found.problems[0].error
    return found.label_maps


def examine(
    dataset,
    name,
    decode=True,
    images=True,
    workers=None,
    ignored=None,
    outputs=None,
    share=(0, 1),
    most=lambda samples: samples,
    progress=lambda name, done, total: None,
):
    """Look for samples that cannot be used, such as those without a file.

    A label map has to be there, of the size of its image, and hold labels of the
    data set's classes or the one to ignore alone; a class has to be one that the
    model has an output for. Images have to be complete.

    Args:
        dataset (Dataset): The data set; wrappers are looked into.
        name (str): How the config names it.
        decode (bool): Whether to read all labels of label maps, not only their sizes.
        images (bool | str): Whether to look at images of data sets without label
            maps, which lie on this machine: at their ends, or, ``'whole'``, at all of
            them.
        workers (int, optional): Threads. Default: as many as there are cores, 8 at
            most.
        ignored (Collection[int], optional): Labels of pixels that the model ignores.
            Default: the data set's ``ignore_index``.
        outputs (int, optional): Of the model, for a class each. Default: as many as
            the data set has classes.
        share (tuple[int, int]): Rank and number of the processes that look at a
            share of the files each.
        most (Callable): From the number of a data set's samples to the number of
            problems after which no more are looked for.
        progress (Callable): Called with the name of a data set, and the numbers of
            samples looked at and of those to look at.

    Returns:
        Findings: Of this share.

    Raises:
        ValueError: If a data set is empty.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    rank, processes = share
    found = Findings()
    for path, part in leaves(dataset, name):
        _check_has_samples(part, path)
        check = SampleCheck(part, path, decode, images, ignored, outputs)
        if not check.samples:
            continue
        total = found.sizes[path] = len(part)
        counts, label_maps = Counter(), 0
        problems = list(_unlisted(part, path)) if rank == 0 and images else []
        indices = range(rank, total, processes)
        chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
        done = 0
        with ThreadPoolExecutor(workers) as pool:
            for chunk, result in zip(chunks, pool.map(check.run, chunks), strict=True):
                label_maps += result.label_maps
                found.images += result.images
                counts += result.classes
                problems += result.problems
                done += len(chunk)
                progress(path, done, len(indices))
                if len(problems) > most(total):
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
        found.label_maps += label_maps
        # Label maps of which every pixel is ignored have no class at all.
        if counts or (label_maps and check.labels is not None):
            found.classes[path] = counts
        found.problems += problems
        found.dark += check.dark
    return found


def _check_has_samples(dataset, name):
    if not hasattr(dataset, '__len__') or len(dataset) > 0:
        return
    said = f'{name} ({type(dataset).__name__}) has no samples'
    if getattr(dataset, 'data_prefix', None):
        said += (
            f': it finds no images in data_root={getattr(dataset, "data_root", None)!r}'
            f' with data_prefix={dict(dataset.data_prefix)}'
        )
        if hasattr(dataset, 'img_suffix'):
            said += f' that end in {dataset.img_suffix!r}'
    raise ValueError(
        f'{said}; correct data_root and data_prefix, and the suffix of the images'
    )


def _unlisted(dataset, name):
    """Links that lead nowhere, which data sets that list folders pass over."""
    prefix = getattr(dataset, 'data_prefix', None) or {}
    root = prefix.get('img_path') if hasattr(prefix, 'get') else None
    if getattr(dataset, 'ann_file', '') or not root or not os.path.isdir(root):
        return
    # mmseg's, and mmpretrain's.
    suffix = getattr(dataset, 'img_suffix', None)
    suffix = suffix or tuple(getattr(dataset, 'extensions', ()))
    if not suffix:
        return
    folders = [root]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith('.'):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif (
                    entry.is_symlink()
                    and entry.name.endswith(suffix)
                    and not os.path.exists(entry.path)
                ):
                    said = (
                        f'{entry.path} does not exist: it is a link to '
                        f'{os.readlink(entry.path)}, which is gone; restore that, or '
                        'remove the link'
                    )
                    yield Problem(name, None, entry.path, said, True)
