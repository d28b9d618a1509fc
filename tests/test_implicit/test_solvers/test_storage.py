"""What a solve allocates at its peak, in copies of the state."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdeq_mm.implicit import AndersonSolver, BroydenSolver

DIM = 20000


class Allocations(TorchDispatchMode):
    """Follows the storages that operations return; those that lived before count not.

    Attributes:
        peak (int): Most bytes of them that lived at once.
    """

    def __init__(self, before):
        super().__init__()
        self.before = [StorageWeakRef(t.untyped_storage()) for t in before]
        self.known = {ref.cdata for ref in self.before}
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # An expired reference still owns its address, so that none is used twice.
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.known:
                    self.live[ref.cdata] = (ref, storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return out


class InPlace:
    """f(z) = a cos(z) + b, written to memory of its own, a different a a sample."""

    def __init__(self, scale, shift, buffers):
        self.scale, self.shift, self.buffers = scale, shift, buffers

    def __call__(self, z, tensors=None):
        # The last result is still in use when the next one is made.
        self.buffers.append(self.buffers.pop(0))
        out = self.buffers[0][: len(z)]
        torch.cos(z, out=out)
        return out.mul_(self.scale).add_(self.shift)

    def take(self, index):
        return InPlace(self.scale[index], self.shift, self.buffers)


def copies_of_the_state(solver, n=8, dim=DIM, drop=False):
    """Peak of a solve in copies of the state, and its solution."""
    equation = InPlace(
        torch.linspace(0.05, 0.97, n)[:, None],
        torch.randn(dim),
        [torch.empty(n, dim) for _ in range(2)],
    )
    start = torch.zeros(n, dim)
    own = [start, equation.scale, equation.shift, *equation.buffers]
    with Allocations(own) as allocations:
        solution = solver.solve(equation, start, drop_finished=drop)
    return allocations.peak / start.nbytes, solution


CASES = [
    (kind, memory) for kind in (AndersonSolver, BroydenSolver) for memory in (1, 3, 8)
]
every_case = pytest.mark.parametrize(('kind', 'memory'), CASES)
# Residuals, masks and matrices as small as the memory: 1 % of a state.
SLACK = 0.05


def test_the_measure():
    """Three copies at once at most, one of them freed, memory of before not counted."""
    x = torch.zeros(1000)
    with Allocations([x]) as allocations:
        a = x + 1
        b = a * 2
        c = (a + b).view(10, 100)[2:]
        del a, b
        x.add_(1)
        d = c + 1
    assert allocations.peak == 3 * x.nbytes
    assert d.shape == (8, 100)


@every_case
def test_with_everyone_in_the_batch(kind, memory):
    # All run to the end: there is nothing to mask.
    peak, solution = copies_of_the_state(kind(12, 0, memory=memory))
    assert solution.steps.eq(12).all()
    assert 2 * memory + 2 <= peak <= 2 * memory + 4 + SLACK


@every_case
@pytest.mark.parametrize('drop', [False, True])
def test_with_samples_that_finish(kind, memory, drop):
    peak, solution = copies_of_the_state(kind(20, 1e-4, memory=memory), drop=drop)
    assert solution.steps.unique().numel() >= 3
    assert 2 * memory + 2 <= peak <= 2 * memory + 4 + SLACK


@pytest.mark.parametrize('kind', [AndersonSolver, BroydenSolver])
def test_does_not_grow_with_the_steps(kind):
    few, many = (copies_of_the_state(kind(n, 0, memory=3))[0] for n in (10, 50))
    # Where not all samples improve, a mask of a number a sample is there too.
    state = 8 * DIM * 4
    assert abs(many - few) * state < 500
