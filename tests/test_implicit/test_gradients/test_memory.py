"""What is kept for the backward pass, and that nothing is kept after it."""

import gc
import weakref

import pytest
import torch

from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    ImplicitGradient,
    PhantomGradient,
    PicardSolver,
    UnrolledGradient,
)
from tests.helpers import GRADIENTS, gradient_of, project_classifier, tanh


def saved_bytes(function):
    """Bytes that autograd keeps for a backward pass, each storage once.

    Args:
        function (Callable): Returns what the backward pass starts from, which
            has to live while the bytes are counted.
    """
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result is not None
    return sum(s.nbytes() for s in storages.values())


def bytes_of(gradient, solver, recompute=False):
    equation = tanh(30, 50, recompute=recompute)
    start = torch.zeros(30, 50).double()
    return saved_bytes(lambda: gradient(equation, start, solver))


STEPS = (2, 10, 40)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize(
    'gradient', [ImplicitGradient(), PhantomGradient(5)], ids=['implicit', 'phantom']
)
@pytest.mark.parametrize('kind', [PicardSolver, AndersonSolver, BroydenSolver])
def test_does_not_grow_with_the_steps_of_the_solver(gradient, kind, recompute):
    found = {bytes_of(gradient, kind(n, tol=0), recompute) for n in STEPS}
    assert len(found) == 1
    assert found.pop() > 0


def test_does_not_grow_with_the_terms_of_the_series():
    found = {bytes_of(PhantomGradient(n), PicardSolver(5, tol=0)) for n in STEPS}
    assert len(found) == 1


def test_does_not_grow_with_the_steps_of_the_adjoint():
    """Those of the backward pass itself count too."""
    peaks = []
    for steps in (3, 30):
        gradient = ImplicitGradient(PicardSolver(steps, tol=0))
        equation = tanh(3, 50)
        out, _ = gradient(equation, torch.zeros(3, 50).double(), PicardSolver(5, tol=0))
        peaks.append(saved_bytes(lambda out=out: out.sum().backward() or True))
    assert peaks[0] == peaks[1]


def test_grows_where_it_is_said_to():
    solver = PicardSolver(5, tol=0)
    for make in (UnrolledGradient, lambda n: PhantomGradient(n, unroll=True)):
        few, many = (bytes_of(make(n), solver) for n in (2, 10))
        assert many > 2 * few
        few, many = (bytes_of(make(n), solver, recompute=True) for n in (2, 10))
        # Recomputed, only the states between the steps are kept.
        assert many - few <= 8 * 30 * 50 * 8


def bytes_an_image(with_cp, **options):
    """The slope over the batch: weights are kept once, whatever the batch is."""
    model = project_classifier(with_cp=with_cp, **options).train()
    few, many = (
        saved_bytes(lambda n=n: model.backbone(torch.randn(n, 3, 30, 23).double()))
        for n in (2, 6)
    )
    return (many - few) / 4


@pytest.mark.parametrize(
    'gradient', [dict(type='ImplicitGradient'), dict(type='PhantomGradient', steps=3)]
)
def test_of_a_backbone(gradient):
    def solver(steps):
        return dict(type='BroydenSolver', max_steps=steps, tol=0)

    kept, recomputed = (
        {bytes_an_image(cp, gradient=gradient, solver=solver(n)) for n in (3, 20)}
        for cp in (False, True)
    )
    assert len(kept) == len(recomputed) == 1
    # The stem's share is in both.
    assert recomputed.pop() < 0.6 * kept.pop()


def test_the_graph_within_is_counted():
    """Saved tensors of the recorded f are seen by hooks, not hidden on ctx."""
    n, dim = 64, 100
    equation = tanh(n, dim)
    solver = PicardSolver(3, tol=0)
    start = torch.zeros(n, dim).double()
    found = saved_bytes(lambda: ImplicitGradient()(equation, start, solver))
    state = n * dim * 8
    # At least z* and tanh's output, beside the equation's own tensors.
    assert found >= 2 * state + dim * dim * 8


class Watched:
    """Big tensors that pass through an equation, by weak reference."""

    def __init__(self, equation):
        self.equation = equation
        self.seen = []
        equation.function = self.wrap(equation.function)

    def wrap(self, function):
        seen = self.seen

        def watched(z, tensors):
            out = function(z, tensors)
            seen.extend(map(weakref.ref, (z, out)))
            return out

        return watched

    def alive(self):
        return [ref() for ref in self.seen if ref() is not None]


@pytest.fixture
def no_collector():
    """Without the collector of cycles, a cycle keeps what it holds."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures('no_collector')
class TestNothingHangsOn:
    @pytest.mark.parametrize('name', GRADIENTS)
    @pytest.mark.parametrize('backward', [False, True])
    def test_after_the_last_reference(self, name, backward):
        gradient, recompute = gradient_of(name, steps=5)
        equation = tanh(3, 20, recompute=recompute)
        watched = Watched(equation)
        out, solution = gradient(
            equation, torch.zeros(3, 20).double(), BroydenSolver(10, 0)
        )
        refs = [weakref.ref(out), weakref.ref(solution), weakref.ref(solution.value)]
        if backward:
            out.sum().backward()
            refs += map(weakref.ref, [solution.adjoint] if solution.adjoint else [])
        assert watched.seen
        del out, solution
        assert watched.alive() == []
        assert [ref() for ref in refs] == [None] * len(refs)

    @pytest.mark.parametrize('name', [n for n in GRADIENTS if 'unrolled' not in n])
    def test_the_recorded_f_is_freed_by_the_backward_pass(self, name):
        gradient, recompute = gradient_of(name, steps=5)
        equation = tanh(3, 20, recompute=recompute)
        watched = Watched(equation)
        out, solution = gradient(
            equation, torch.zeros(3, 20).double(), BroydenSolver(10, 0)
        )
        out.sum().backward()
        # The output and z* are still held here, and nothing else.
        kept = {id(out), id(solution.value)}
        pointers = {out.data_ptr(), solution.value.data_ptr()}
        left = [t for t in watched.alive() if id(t) not in kept]
        assert all(t.data_ptr() in pointers for t in left)

    @pytest.mark.parametrize('with_cp', [False, True])
    @pytest.mark.parametrize('backward', [False, True])
    @pytest.mark.parametrize(
        'gradient',
        [
            dict(type='ImplicitGradient'),
            dict(type='PhantomGradient', steps=2),
            dict(type='PhantomGradient', steps=2, unroll=True),
            dict(type='UnrolledGradient', steps=3),
        ],
        ids=str,
    )
    def test_of_a_backbone(self, gradient, backward, with_cp):
        model = project_classifier(gradient=gradient, with_cp=with_cp).train()
        images = torch.randn(2, 3, 14, 11).double()
        model.backbone(images)
        refs = []

        def watch(module, inputs, output):
            refs.append(weakref.ref(output))

        handle = model.backbone.stem[0].register_forward_hook(watch)
        maps = model.backbone(images)
        handle.remove()
        refs += map(weakref.ref, maps)
        if backward:
            sum(m.sum() for m in maps).backward()
        del maps
        assert len(refs) == 4
        # What is left is the last solution, which holds no graph.
        assert [ref() for ref in refs] == [None] * 4
        assert model.backbone.last_solution.value.grad_fn is None

    def test_count_of_tensors_does_not_grow(self):
        model = project_classifier().train()
        images = torch.randn(2, 3, 14, 11).double()

        def count():
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

        counts = []
        for _ in range(4):
            model.backbone(images)[0].sum().backward()
            counts.append(count())
        assert counts[1] == counts[2] == counts[3]
