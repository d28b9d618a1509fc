"""The Jacobian loss under distributed training, accumulation and loss scaling."""

import os

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import multiprocessing

from tests.test_engine.test_hooks.test_jacobian_schedule_hook import Capable


def model_and_data(rank):
    torch.manual_seed(0)
    model = Capable().double()
    # Batch norms in evaluation mode: each process has its own statistics.
    model.backbone.norm_eval = True
    generator = torch.Generator().manual_seed(10 + rank)
    images = torch.randn(2, 3, 8, 8, generator=generator).double()
    model.train()
    model.set_jacobian(3.0, probes=2, seed=rank)
    return model, images, torch.tensor([0, 1])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in model.parameters()]  # fmt: skip


def total(losses):
    return losses['loss'] + losses['loss_jac']


def process(rank, folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    model, images, labels = model_and_data(rank)
    # No find_unused_parameters: all of them take part.
    wrapped = MMDistributedDataParallel(model)
    found = gradients(model, total(wrapped(images, labels, 'loss')))
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_mean_of_their_gradients(tmp_path):
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    alone = []
    for rank in (0, 1):
        model, images, labels = model_and_data(rank)
        alone.append(gradients(model, total(model(images, labels, 'loss'))))
    assert any(
        not torch.allclose(one, two) for one, two in zip(*alone, strict=True)
    )  # fmt: skip
    for mine, theirs, one, two in zip(*found, *alone, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, (one + two) / 2, rtol=1e-9, atol=1e-13)


def test_accumulation_is_the_mean_over_its_batches():
    expected = []
    for rank in (0, 1):
        model, images, labels = model_and_data(rank)
        expected.append(gradients(model, total(model(images, labels, 'loss'))))
    model, _, _ = model_and_data(0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 2)
    for rank in (0, 1):
        _, images, labels = model_and_data(rank)
        model.set_jacobian(3.0, probes=2, seed=rank)
        with wrapper.optim_context(model):
            loss = total(model(images, labels, 'loss'))
        wrapper.update_params(loss)
    for p, old, one, two in zip(model.parameters(), before, *expected, strict=True):
        torch.testing.assert_close(old - p, (one + two) / 2, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize('scale', [2.0**16, 2.0**-16])
def test_a_scaled_loss_scales_its_gradient(scale):
    model, images, labels = model_and_data(0)
    found = [
        gradients(model, factor * model(images, labels, 'loss')['loss_jac'])
        for factor in (1.0, scale)
    ]
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, scale * plain, rtol=1e-12, atol=0)


def test_under_autocast():
    """Half precision is close to single precision, and f's weights get gradients."""
    found = []
    for half in (False, True):
        model, images, labels = model_and_data(0)
        model.float()
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            losses = model(images.float(), labels, 'loss')
        found.append((losses['loss_jac'].item(),
                      gradients(model, losses['loss_jac'])))  # fmt: skip
    (plain, grads), (half, others) = found
    assert half == pytest.approx(plain, rel=0.1)
    norms = [torch.cat([g.flatten() for g in gs]).norm() for gs in (grads, others)]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.3)
