"""Two processes train as one does with the doubled batch, and none waits for ever."""

import pytest
import torch

from tests.helpers import relative

from .jobs import FAULTS, TRAININGS

# The first test waits for all that the processes do.
pytestmark = pytest.mark.timeout(900)

#: Relative, of all weights together. Solves are made sample by sample, so that what
#: differs is the order of sums over the batch and between processes, in double
#: precision. mmseg divides by the number of pixels and the epsilon of float32, which
#: is another share of half as many pixels.
TOLERANCE = 1e-12
SEGMENTOR = 1e-8


@pytest.mark.parametrize('name', TRAININGS)
def test_ten_steps_equal_those_of_one_process(found, name):
    mine, theirs = (process['together'][name] for process in found)
    (expected,) = (p['alone'][name] for p in found if name in p['alone'])
    tolerance = SEGMENTOR if name == 'segmentor' else TOLERANCE
    assert mine['weights'].keys() == expected['weights'].keys()
    for key, weight in mine['weights'].items():
        assert torch.equal(weight, theirs['weights'][key]), key
        assert relative(weight, expected['weights'][key]) < tolerance, key
    assert relative(mine['momentum'], expected['momentum']) < 100 * tolerance
    # The mean of the two halves.
    losses = zip(mine['losses'], theirs['losses'], strict=True)
    losses = [(a + b) / 2 for a, b in losses]
    assert losses == pytest.approx(expected['losses'], rel=10 * tolerance)
    for key in ('steps', 'adjoint_steps'):
        halves = zip(mine[key], theirs[key], strict=True)
        assert [a + b for a, b in halves] == expected[key]


def test_processes_that_take_different_numbers_of_steps_are_among_them(found):
    """Evaluations of f, products with its Jacobian, and one that solves on alone."""
    for name, key in (
        ('implicit', 'steps'),
        ('implicit', 'adjoint_steps'),
        ('shared inverse, fallback', 'adjoint_steps'),
    ):
        mine, theirs = (process['together'][name][key] for process in found)
        most = [(max(a), max(b)) for a, b in zip(mine, theirs, strict=True)]
        assert any(a != b for a, b in most), (name, key, most)
        if name != 'implicit':
            assert any(a == 1 < b or b == 1 < a for a, b in most), most
            # And within one process.
            assert any(min(a) == 1 < max(a) for a in mine + theirs)


@pytest.mark.parametrize('name', FAULTS)
def test_a_process_with_a_fault_keeps_nobody_waiting(found, name):
    """Under mmengine's own wrapper, which does not look at what it applies."""
    (counts, mine), (others, theirs) = (process['fault'][name] for process in found)
    assert counts == others == [1, 2, 3]
    weights = [key for key in mine if 'running' not in key and 'tracked' not in key]
    for key in weights:
        # Bit for bit, what is not a number included.
        assert torch.equal(mine[key].nan_to_num(7.0), theirs[key].nan_to_num(7.0)), key
    finite = all(mine[key].isfinite().all() for key in weights)
    # A sample whose solve failed contributes nothing. An image that is no number
    # reaches the weights by way of the stem, in all processes alike:
    # EquilibriumOptimWrapper is there to drop such a step.
    assert finite == (name == 'f')


def test_an_uneven_last_batch(found):
    """Nine images: each process gets five, the first of them twice."""
    (sizes, mine), (others, theirs) = (process['uneven'] for process in found)
    assert sizes == others == [4, 1] * 3
    for key in mine:
        if 'running' not in key:
            assert torch.equal(mine[key], theirs[key]), key
            assert mine[key].isfinite().all()


def test_data_that_let_processes_wait_are_refused(found):
    mine, theirs = (process['refused'] for process in found)
    assert mine == theirs
    said = mine['not rounded up']
    assert '4 to 5 batches an epoch' in said
    assert 'train_dataloader.sampler.round_up=True' in said
    said = mine['different files']
    assert 'different numbers of samples in train_dataloader.dataset, 8 to 9' in said
    assert mine['not rounded up, as many batches'] is None
