"""The same numbers on a GPU, without stopping it more often than once a step."""

import warnings

import pytest
import torch

from mdeq_mm.implicit import ImplicitGradient, PhantomGradient
from tests.helpers import SOLVERS, cosine, relative, tanh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


def on_gpu(equation):
    tensors = [t.detach().cuda().requires_grad_() for t in equation.tensors]
    return type(equation)(equation.function, tensors, equation.per_sample)


def start_of(equation):
    return torch.zeros_like(equation.tensors[1]).detach()


@pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)
def test_solution_and_gradient(kind):
    equation = tanh(5, 20)
    solver = kind(100, 1e-11)
    results = []
    for one in (equation, on_gpu(equation)):
        out, solution = ImplicitGradient(solver)(one, start_of(one), solver)
        assert solution.converged.all()
        grads = torch.autograd.grad(out.square().sum(), one.tensors)
        results.append([out.cpu(), *(g.cpu() for g in grads)])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-8


@pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)
def test_synchronisations(kind):
    equation = on_gpu(tanh(5, 20, radius=0.9))
    start = start_of(equation)
    solver = kind(12, 1e-12)
    solver.solve(equation, start)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            solver.solve(equation, start)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([w for w in caught if 'synchroniz' in str(w.message)]) <= 12


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('gradient', [ImplicitGradient(), PhantomGradient(8)])
def test_autocast(dtype, gradient):
    equation = on_gpu(tanh(5, 20, radius=0.5, dtype=torch.float32))
    solver = SOLVERS['anderson'](40, 1e-3)
    grads = []
    for enabled in (False, True):
        with torch.autocast('cuda', dtype, enabled=enabled):
            # The mode of its construction is part of an equation.
            one = type(equation)(
                equation.function, equation.tensors, equation.per_sample
            )
            out, solution = gradient(one, start_of(one), solver)
        assert out.dtype == solution.value.dtype == torch.float32
        loss = out.square().sum() * (1 + 65535 * enabled)
        grads.append(torch.autograd.grad(loss, one.tensors))
    assert cosine(grads[1], grads[0]) > 0.99
