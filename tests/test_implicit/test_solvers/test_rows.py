import pytest
import torch

from mdeq_mm.implicit.solvers.rows import combine, combine_into, compact, project

DEVICES = [
    'cpu',
    pytest.param(
        'cuda',
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason='there is no GPU'
        ),
    ),
]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('shape', [(3, 4, 50), (1, 1, 7), (2, 5, 1)])
def test_against_einsum(device, shape):
    n, m, d = shape
    # As solvers have it: the filled part of a larger buffer.
    history = torch.randn(n, m + 3, d, device=device).double()[:, :m]
    vector = torch.randn(n, d, device=device).double()
    weights = torch.randn(n, m, device=device).double()
    torch.testing.assert_close(
        project(history, vector), torch.einsum('nmd,nd->nm', history, vector)
    )
    torch.testing.assert_close(
        combine(history, weights), torch.einsum('nmd,nm->nd', history, weights)
    )
    other = torch.full((n, 3, d), torch.nan, device=device).double()
    combine_into(other[:, 1], vector, history, weights)
    torch.testing.assert_close(
        other[:, 1], vector + torch.einsum('nmd,nm->nd', history, weights)
    )
    assert other[:, [0, 2]].isnan().all()


@pytest.mark.parametrize('name', ['project', 'combine'])
def test_autocast_does_not_round(name):
    history = torch.randn(2, 3, 50)
    other = torch.randn(2, 50) if name == 'project' else torch.randn(2, 3)
    function = dict(project=project, combine=combine)[name]
    expected = function(history, other)
    with torch.autocast('cpu', torch.bfloat16):
        found = function(history, other)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize('index', [[0, 2, 3], [3], [], [0, 1, 2, 3]])
def test_samples_move_to_the_front_of_their_history(index):
    history = torch.randn(4, 3, 5)
    expected = history[index].clone()
    found = compact(history, torch.tensor(index, dtype=torch.int64))
    assert torch.equal(found, expected)
    assert found.data_ptr() == history.data_ptr() or not index
