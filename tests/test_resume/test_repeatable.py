"""Order and augmentation that follow from seed, epoch and index."""

import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mdeq_mm.resume.repeatable import (
    EndlessBatches,
    RepeatableDataset,
    SampleIndex,
    repeatable,
)


class Drawn(Dataset):
    """Samples of an index and a number of each generator."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def loader(sampler, workers=0, batch_size=2, drop_last=False):
    return DataLoader(
        Drawn(),
        batch_size=batch_size,
        sampler=sampler(Drawn(), seed=3),
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=workers > 0,
    )


def epochs(workers, count=2, skip=0):
    """All samples of some epochs, in order."""
    made = repeatable(loader(DefaultSampler, workers), seed=5)
    found = []
    for epoch in range(count):
        made.batch_sampler.epoch = epoch
        made.batch_sampler.sampler.set_epoch(epoch)
        made.batch_sampler.skip = skip if epoch == 0 else 0
        found.append([sample for batch in made for sample in batch])
    return found


def test_samples_do_not_depend_on_workers():
    first, second = epochs(0)
    assert sorted(s[0] for s in first) == list(range(7))
    assert [first, second] == epochs(2)
    # Each epoch has an order and augmentation of its own.
    assert [s[0] for s in first] != [s[0] for s in second]
    assert not {s[1:] for s in first} & {s[1:] for s in second}
    assert len({n for s in first + second for n in s[1:]}) == 3 * 14


def test_an_epoch_goes_on_where_it_was_left():
    whole = epochs(0)
    assert epochs(0, skip=3) == [whole[0][6:], whole[1]]
    assert epochs(2, skip=3) == [whole[0][6:], whole[1]]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('advanced', [False, True], ids=['skipping', 'loading'])
@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
def test_iterations_go_on_where_they_were_left(sampler, advanced, workers):
    def take(begin, count):
        old = loader(sampler, workers)
        # As the loop of the original mmengine does, whose workers fetch ahead.
        begun = iter(old)
        next(begun)
        batches = EndlessBatches(repeatable(old, seed=5), begin, advanced)
        if advanced:
            assert [next(batches) for _ in range(begin)] == [None] * begin
        else:
            batches.skip_iter(begin)
        return [next(batches) for _ in range(count)]

    whole = take(0, 12)
    assert take(5, 7) == whole[5:]
    # The passes over the data differ in their augmentation.
    numbers = [s[1] for batch in whole for s in batch]
    assert len(set(numbers)) == len(numbers)


def test_an_endless_sampler_counts_its_rounds():
    made = repeatable(loader(InfiniteSampler, batch_size=4), seed=5)
    batches = iter(made.batch_sampler)
    drawn = [index for _ in range(5) for index in next(batches)]
    assert [index.epoch for index in drawn] == [0] * 7 + [1] * 7 + [2] * 6
    assert sorted(drawn[:7]) == list(range(7))


def test_a_custom_batch_sampler_keeps_its_batches():
    class Pairs(BatchSampler):
        def __iter__(self):
            yield from [[0, 6], [1, 5], [2, 4]]

        def __len__(self):
            return 3

    pairs = Pairs(DefaultSampler(Drawn(), seed=1), 2, False)
    made = repeatable(DataLoader(Drawn(), batch_sampler=pairs, collate_fn=list), seed=5)
    assert [[s[0] for s in batch] for batch in made] == [[0, 6], [1, 5], [2, 4]]
    assert len(made) == 3


def test_a_sample_that_is_drawn_again_is_augmented_anew():
    """As repeated augmentation wants it; and the same after a resume."""

    class Repeated(Sampler):
        def __init__(self, dataset, seed):
            self.seed = seed

        def __iter__(self):
            return iter([3, 3, 3, 5, 5, 5])

        def __len__(self):
            return 6

    def draw(skip=0):
        made = repeatable(loader(Repeated), seed=5)
        made.batch_sampler.skip = skip
        return [sample for batch in made for sample in batch]

    whole = draw()
    assert [s[0] for s in whole] == [3, 3, 3, 5, 5, 5]
    assert len({s[1] for s in whole}) == 6
    assert draw(skip=2) == whole[4:]


def test_the_loader_keeps_its_settings():
    old = loader(DefaultSampler, workers=1, drop_last=True)
    made = repeatable(old, seed=5)
    names = 'num_workers collate_fn persistent_workers prefetch_factor batch_size'
    for name in [*names.split(), 'drop_last', 'sampler']:
        assert getattr(made, name) == getattr(old, name), name
    assert len(made) == len(old) == 3
    assert made.batch_sampler.batch_size == 2 and made.batch_sampler.drop_last
    assert made.dataset.metainfo == Drawn.metainfo and len(made.dataset) == 7


def test_what_is_set_is_set_in_the_data_set_itself():
    """As hooks do that change a pipeline half way."""
    dataset = Drawn()
    wrapped = RepeatableDataset(dataset, 5)
    wrapped.pipeline = 'new'
    assert dataset.pipeline == wrapped.pipeline == 'new'
    assert vars(wrapped) == dict(dataset=dataset, seed=5)


def test_a_second_training_by_the_same_runner():
    """Nothing is wrapped twice: the epochs keep their own augmentation."""
    once = repeatable(loader(DefaultSampler), seed=5)
    twice = repeatable(once, seed=5)
    twice.batch_sampler.epoch = once.batch_sampler.epoch = 1
    assert list(twice) == list(once)
    assert isinstance(twice.dataset.dataset, Drawn)
    assert isinstance(twice.batch_sampler.batches, BatchSampler)


def test_seed_of_a_sampler_can_be_restored():
    made = repeatable(loader(DefaultSampler), seed=5, sampler_seed=11)
    order = [int(i) for batch in made.batch_sampler for i in batch]
    assert order == list(DefaultSampler(Drawn(), seed=11))


def test_indices_and_data_sets_travel_to_workers():
    index = pickle.loads(pickle.dumps(SampleIndex(4, 9)))
    assert (index, index.epoch) == (4, 9)
    dataset = pickle.loads(pickle.dumps(RepeatableDataset(Drawn(), 5)))
    assert dataset[index] == RepeatableDataset(Drawn(), 5)[SampleIndex(4, 9)]
    assert dataset[index] != dataset[SampleIndex(4, 8)]
