import pickle

import pytest
import torch

from mdeq_mm.implicit import Solution, Status


@pytest.fixture
def solution():
    return Solution(
        value=torch.zeros(4, 2),
        residual=torch.tensor([1e-5, 1e-3, 2e-2, torch.inf]),
        steps=torch.tensor([4, 12, 30, 2]),
        status=torch.tensor(
            [Status.CONVERGED, Status.STALLED, Status.MAX_STEPS, Status.DIVERGED]
        ),
    )


def test_every_status_gives_its_own_advice():
    advice = [status.advice for status in Status]
    assert [status.name for status in Status] == [
        'CONVERGED',
        'STALLED',
        'MAX_STEPS',
        'DIVERGED',
    ]
    assert len(set(advice)) == 4
    assert all(text.endswith('.') and text[0].isupper() for text in advice)


def test_converged(solution):
    assert solution.converged.tolist() == [True, False, False, False]


def test_shares(solution):
    solution.status[1] = Status.CONVERGED
    assert solution.shares() == dict(
        converged=0.5, stalled=0.0, max_steps=0.25, diverged=0.25
    )


def test_text_says_how_it_went_and_what_to_do(solution):
    text = str(solution)
    assert '4 sample' in text
    assert '25% converged' in text
    assert '12.0 evaluations' in text
    assert text.endswith(Status.DIVERGED.advice)


def test_pickles(solution):
    again = pickle.loads(pickle.dumps(solution))
    assert again.status.tolist() == solution.status.tolist()
    assert again.trace is None
