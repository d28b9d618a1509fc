"""MDEQ in mmseg's EncoderDecoder against numbers of the official segmentation."""

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from tests.helpers import (
    label_maps,
    load_tool,
    needs_shared,
    official_seg_golden,
    official_segmentor,
    relative,
)

pytestmark = needs_shared('golden', 'golden_seg.pt')


@pytest.fixture(scope='module')
def golden():
    return official_seg_golden()


def predict(model, images, **metas):
    """Logits before upsampling, and the predictions of EncoderDecoder."""
    height, width = images.shape[2:]
    samples = label_maps(torch.zeros(len(images), height, width, dtype=torch.long))
    with torch.no_grad():
        logits = model(images, mode='tensor')
        samples = model(images, samples, mode='predict')
    return logits, torch.stack([s.seg_logits.data for s in samples])


def test_equilibrium_and_logits(golden):
    model, _ = official_segmentor()
    logits, upsampled = predict(model, golden['input'].double())
    maps = model.backbone.equilibrium.last_solution
    assert maps.converged.all()
    assert relative(logits, golden['eval']['logits']) < 1e-8
    expected = interpolate(
        golden['eval']['logits'].double(), (64, 96), mode='bilinear', align_corners=True
    )
    assert relative(upsampled, expected) < 1e-8


def test_logits_of_a_converted_file(golden, tmp_path):
    tool = load_tool('tools/model_converters/mdeq2mm.py')
    source, target = tmp_path / 'official.pkl', tmp_path / 'mdeq.pth'
    torch.save(golden['official_state_dict'], source)
    tool.main([str(source), str(target), '--task', 'seg'])
    model, _ = official_segmentor()
    for parameter in model.parameters():
        parameter.data.zero_()
    state = torch.load(target, weights_only=True)['state_dict']
    model.load_state_dict(state)
    logits, _ = predict(model, golden['input'].double())
    assert relative(logits, golden['eval']['logits']) < 1e-8


def check_gradients(model, names, golden, key, tolerance):
    expected = golden[key]
    images = golden['input'].double()
    losses = model(images, label_maps(golden['target']), mode='loss')
    loss = losses['decode.loss_ce']
    assert loss.item() == pytest.approx(expected['loss'].item(), rel=1e-8)
    model.zero_grad()
    loss.backward()
    official = {ours: theirs for theirs, ours in names.items()}
    found = {n: p.grad for n, p in model.named_parameters()}
    assert {official[n] for n in found} == set(expected['grads']) - {
        # It has no effect in front of a batch norm, and is part of it here.
        'last_layer.0.bias'
    }
    assert expected['grads']['last_layer.0.bias'].norm() < 1e-12
    for name, grad in found.items():
        reference = expected['grads'][official[name]]
        assert reference.norm() > 1e-12, name
        assert relative(grad, reference) < tolerance, name


@pytest.mark.parametrize('with_cp', [False, True])
def test_implicit_gradient_of_every_parameter(golden, with_cp):
    model, names = official_segmentor(with_cp=with_cp)
    check_gradients(model.train(), names, golden, 'train_implicit', 1e-6)
    solution = model.backbone.last_solution
    assert solution.converged.all() and solution.adjoint.converged.all()


def test_unrolled_gradient_of_every_parameter(golden):
    model, names = official_segmentor()
    steps = golden['train_unrolled']['num_layers']
    model.backbone.equilibrium.unroll_steps = steps
    check_gradients(model.train(), names, golden, 'train_unrolled', 1e-9)


def test_logits_in_training(golden):
    model, _ = official_segmentor()
    logits = model.train()(golden['input'].double(), mode='tensor')
    assert relative(logits, golden['train_implicit']['logits']) < 1e-8


def test_running_statistics_take_the_folded_bias_along(golden):
    """After a training step, evaluation is what it is with the bias unfolded."""
    model, _ = official_segmentor()
    state = {k: v.double() for k, v in golden['official_state_dict'].items()}
    bias = state['last_layer.0.bias']
    assert bias.abs().max() > 1e-4
    images = golden['input'].double()
    seen = []
    conv = model.decode_head.convs[0].conv
    handle = conv.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    model.train()(images, mode='tensor')
    handle.remove()
    momentum = model.decode_head.convs[0].bn.momentum
    mean = (seen[0] + bias.view(1, -1, 1, 1)).mean((0, 2, 3))
    unfolded = (1 - momentum) * state['last_layer.1.running_mean'] + momentum * mean
    found = model.decode_head.convs[0].bn.running_mean
    assert relative(found, unfolded - bias) < 1e-12


def test_the_loss_is_the_cross_entropy_over_labelled_pixels(golden):
    model, _ = official_segmentor()
    images, target = golden['input'].double(), golden['target']
    assert (target == 255).any()
    with torch.no_grad():
        logits = model(images, mode='tensor')
        losses = model(images, label_maps(target), mode='loss')
    upsampled = interpolate(
        logits, target.shape[1:], mode='bilinear', align_corners=True
    )
    expected = cross_entropy(upsampled, target, ignore_index=255)
    # mmseg adds the epsilon of single precision to the number of pixels.
    assert losses['decode.loss_ce'].item() == pytest.approx(expected.item(), rel=1e-10)
