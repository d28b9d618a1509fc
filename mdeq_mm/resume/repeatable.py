"""Data whose order and augmentation follow from seed, epoch and index alone."""

import copy
import random

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank, get_world_size
from torch.utils.data import DataLoader, Dataset


def seed_everything(*parts):
    """Seed Python, NumPy and PyTorch from what names a moment of a training.

    Args:
        *parts (int | str): Such as seed, purpose, iteration and rank.
    """
    seed = random.Random(repr(parts)).getrandbits(63)
    random.seed(seed)
    # The transforms of mmcv and the toolboxes draw from the generator of the module.
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


class SampleIndex(int):
    """Index of a sample that knows its epoch, which workers are not told otherwise.

    Args:
        index (int): The index.
        epoch (int): The epoch.
        draw (int): Which of several draws of the sample in one epoch.
    """

    def __new__(cls, index, epoch, draw=0):
        self = super().__new__(cls, index)
        self.epoch, self.draw = epoch, draw
        return self

    def __reduce__(self):
        return SampleIndex, (int(self), self.epoch, self.draw)


class RepeatableDataset(Dataset):
    """A data set whose random augmentation is the same wherever it is drawn.

    Before a sample is made, the generators of Python, NumPy and PyTorch are seeded
    from the seed, the epoch and the index, so that neither the number of workers
    nor what was drawn before has a say.

    Args:
        dataset (Dataset): The data set; what is asked of this one beside samples is
            asked of it, and what is set, as by hooks that change its pipeline, is set
            there.
        seed (int): Of the training.
    """

    def __init__(self, dataset, seed):
        vars(self).update(dataset=dataset, seed=seed)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        epoch, draw = getattr(index, 'epoch', 0), getattr(index, 'draw', 0)
        seed_everything(self.seed, 'sample', epoch, draw, int(index))
        return self.dataset[int(index)]

    def __getattr__(self, name):
        # Not what Python itself looks for, such as while the object is unpickled.
        if name.startswith('__') or name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name, value):
        setattr(self.dataset, name, value)


class RepeatableBatches:
    """Batches of indices that know their epoch, from any point of a training on.

    Args:
        batches (BatchSampler): Batches of plain indices.

    Attributes:
        epoch (int): The epoch that is next.
        skip (int): Batches that the next iteration leaves out, because a training
            that is resumed has seen them.
    """

    def __init__(self, batches):
        self.batches = batches
        self.epoch = self.skip = 0

    @property
    def sampler(self):
        """Sampler: Of single indices; hooks tell it of epochs."""
        return self.batches.sampler

    @property
    def batch_size(self):
        """int: Samples of a batch."""
        return self.batches.batch_size

    @property
    def drop_last(self):
        """bool: Whether a last, smaller batch is left out."""
        return self.batches.drop_last

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        skip, self.skip = self.skip, 0
        epoch, drawn = self.epoch, 0
        for number, batch in enumerate(self.batches):
            if number >= skip:
                yield [
                    SampleIndex(index, epoch + rounds, draw)
                    for i, index in enumerate(batch)
                    for rounds, draw in [self._place(drawn + i)]
                ]
            drawn += len(batch)

    def _place(self, position):
        """Rounds of a sampler without end, and what tells draws of a sample apart."""
        sampler, place = self.sampler, position * get_world_size() + get_rank()
        if isinstance(sampler, InfiniteSampler):
            return place // sampler.size, 0
        # This one draws each sample once; others, as for repeated augmentation, may
        # draw one several times, here or in another process.
        return 0, 0 if isinstance(sampler, DefaultSampler) else place


def repeatable(loader, seed, sampler_seed=None):
    """The same loader, with order and augmentation that depend on nothing hidden.

    Args:
        loader (DataLoader): Of map-style data.
        seed (int): Of the augmentation, the same on all processes.
        sampler_seed (int, optional): Of the order, in place of the sampler's own.

    Returns:
        DataLoader: Its ``batch_sampler`` is a :class:`RepeatableBatches`.
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    if isinstance(batches, RepeatableBatches):
        # Of an earlier training by the same runner.
        batches, dataset = batches.batches, dataset.dataset
    sampler = batches.sampler
    if sampler_seed is None:
        sampler_seed = getattr(sampler, 'seed', None)
    elif hasattr(sampler, 'seed'):
        sampler.seed = sampler_seed
    if isinstance(sampler, InfiniteSampler):
        # It goes on where it was left, and workers that began to fetch ahead have
        # taken from it.
        sampler = type(sampler)(sampler.dataset, sampler.shuffle, sampler_seed)
        batches = copy.copy(batches)
        batches.sampler = sampler
    options = {}
    if loader.num_workers:
        options = dict(
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            multiprocessing_context=loader.multiprocessing_context,
        )
    made = DataLoader(
        RepeatableDataset(dataset, seed),
        batch_sampler=RepeatableBatches(batches),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **options,
    )
    # For hooks that ask: a loader that is given batches forgets what they are made of,
    # and lets nobody set it.
    vars(made).update(
        sampler=batches.sampler,
        batch_size=getattr(batches, 'batch_size', None),
        drop_last=getattr(batches, 'drop_last', False),
    )
    return made


class EndlessBatches:
    """Iterator over a loader without end, from any iteration on.

    In place of the one of mmengine's iteration-based loop, which is made before a
    checkpoint is read.

    Args:
        loader (DataLoader): Of :func:`repeatable`.
        begin (int): Iteration to begin with.
        advanced_by_loading (bool): Whether the loop takes ``begin`` batches first
            to get there, as that of the original mmengine does; they are not loaded.
    """

    def __init__(self, loader, begin, advanced_by_loading):
        self._loader = loader
        self._ignored = begin if advanced_by_loading else 0
        batches = loader.batch_sampler
        if isinstance(batches.sampler, InfiniteSampler):
            self._epoch, batches.skip = 0, begin
        else:
            self._epoch, batches.skip = divmod(begin, len(loader))
        self._iterator = None

    def __iter__(self):
        return self

    def skip_iter(self, count):
        """Called by loops that know how to skip; it begins at the right place."""

    def __next__(self):
        if self._ignored:
            self._ignored -= 1
            return None
        if self._iterator is None:
            self._restart()
        try:
            return next(self._iterator)
        except StopIteration:
            self._epoch += 1
            self._restart()
            return next(self._iterator)

    def _restart(self):
        batches = self._loader.batch_sampler
        batches.epoch = self._epoch
        if hasattr(batches.sampler, 'set_epoch'):
            batches.sampler.set_epoch(self._epoch)
        self._iterator = iter(self._loader)
