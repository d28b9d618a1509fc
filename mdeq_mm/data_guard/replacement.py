"""Sound samples in the places of those that cannot be used."""

import logging

from mmengine.logging import print_log
from mmengine.structures import BaseDataElement

# Where a packed sample says whose places it takes.
REPLACED = 'replaced_samples'
# So many in a row are no accident.
_IN_A_ROW = 100


def replace_samples(dataset, bad):
    """Let the next sound sample of a data set take the place of each bad one.

    The data set keeps its length, so that samplers and schedules stay as they are.

    Args:
        dataset (BaseDataset): The data set, no wrapper.
        bad (Collection[int]): Indices of the bad ones.

    Raises:
        ValueError: If there is no sound one.
    """
    total, bad = len(dataset), set(bad)
    if len(bad) >= total:
        raise ValueError('a data set without a sound sample cannot be trained on')
    stand_ins, sound = {}, None
    # Backwards, and from the first on at the end.
    first = next(i for i in range(total) if i not in bad)
    for index in sorted(bad, reverse=True):
        sound = index + 1
        sound = stand_ins.get(sound, first if sound == total else sound)
        stand_ins[index] = sound
    read = dataset.get_data_info
    original = getattr(read, 'original', read)
    dataset.get_data_info = _Redirected(original, stand_ins, total)


class _Redirected:
    """``get_data_info`` of a data set; a class, so that workers can be sent it."""

    def __init__(self, original, stand_ins, total):
        self.original, self.stand_ins, self.total = original, stand_ins, total

    def __call__(self, idx):
        place = idx + self.total if idx < 0 else idx
        return self.original(self.stand_ins.get(place, idx))


def guard_samples(check, skip=False):
    """Name the file in whatever goes wrong while a data set loads a sample.

    For files that were sound, or not looked at, when the training began.

    Args:
        check (SampleCheck): Of the data set.
        skip (bool): Whether the next sample takes the place of one whose files are
            bad. The data samples of that say so, see :func:`replaced_in`. Other
            errors, such as of a transform, are raised in any case.
    """
    load = getattr(check.dataset, 'prepare_data', None)
    if load is not None:
        original = getattr(load, 'original', load)
        check.dataset.prepare_data = _Guarded(original, check, skip)


class _Guarded:
    """``prepare_data`` of a data set."""

    def __init__(self, original, check, skip):
        self.original, self.check, self.skip = original, check, skip

    def __call__(self, idx):
        total, bad = len(self.check.dataset), []
        for step in range(min(_IN_A_ROW, total)):
            at = (idx + step) % total if step else idx
            try:
                item = self.original(at)
            except Exception as error:
                problem = self._problem(at, error)
                if not self.skip:
                    raise problem.error from error
                bad.append(problem)
            else:
                return _marked(item, bad) if bad else item
        raise ValueError(
            f'{len(bad)} samples of {self.check.name} in a row cannot be loaded, the '
            f'first because {bad[0].said}'
        ) from bad[0].error

    def _problem(self, index, error):
        """What is wrong with the files of a sample; other errors are raised."""
        info = self.check.dataset.get_data_info(index)
        problem = self.check.problem(index, info, whole=True)
        if problem is None:
            files = (info.get(key) for key in ('img_path', 'seg_map_path'))
            files = ', '.join(str(file) for file in files if file)
            error.add_note(
                f'This was sample {index} of {self.check.name}'
                + (f': {files}' if files else '')
            )
            raise error
        return problem


def _marked(item, bad):
    sample = item.get('data_samples') if isinstance(item, dict) else None
    said = [(problem.path, problem.said) for problem in bad]
    if isinstance(sample, BaseDataElement):
        sample.set_metainfo({REPLACED: said})
    else:
        for _, words in said:
            print_log(f'Left out: {words}', 'current', logging.WARNING)
    return item


def replaced_in(batch):
    """Files in whose places others were put while a batch was loaded.

    Args:
        batch (dict | list | BaseDataElement): The batch.

    Yields:
        tuple[str, str]: Path of the image, and what was wrong.
    """
    if isinstance(batch, BaseDataElement):
        yield from batch.get(REPLACED, ())
    elif isinstance(batch, dict):
        for part in batch.values():
            yield from replaced_in(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from replaced_in(part)
