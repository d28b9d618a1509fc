"""Evaluation on two processes counts each image once."""

import pytest
import torch

from .jobs import evaluate

# The first test waits for all that the processes do.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope='module')
def one(weights, tmp_path_factory):
    """Results of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('one')
    yield [evaluate(folder, segment, weights) for segment in (False, True)]
    torch.set_num_threads(threads)


# Without rounding up, one process has four images and the other three.
@pytest.mark.parametrize('round_up', [True, False])
@pytest.mark.parametrize('segment', [False, True])
def test_of_an_odd_number_of_images(found, one, segment, round_up):
    mine, theirs = (process['evaluation'][segment, round_up] for process in found)
    assert mine == theirs
    expected = one[segment]
    assert set(mine) == set(expected)
    assert [mine.pop(f'seen/{i}') for i in range(7)] == list(range(7))
    assert not any(name.startswith('seen') for name in mine)
    names = {'mIoU', 'mDice'} if segment else {'accuracy/top1', 'accuracy/top2'}
    for name in (*names, 'equilibrium/evaluations', 'equilibrium/converged'):
        assert mine[name] == expected[name], name
    # Batches of other images round differently.
    for name in ('equilibrium/residual', 'equilibrium/residual_p95'):
        assert mine[name] == pytest.approx(expected[name], rel=1e-3)
    if not segment:
        # A number of images that one more, or one twice, would change.
        correct = mine['accuracy/top2'] * 7 / 100
        assert correct == pytest.approx(round(correct), abs=1e-4)
        assert 0 < round(correct) < 7
