"""Small models that contract, their data, and ten steps of training them."""

from functools import cache

import pytest
import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from tests.helpers import build, build_segmentor, label_maps, segmentor_config

ARCH = dict(channels=(4, 8), num_groups=2, expansion=1, downsample_times=1)
SOLVER = dict(type='AndersonSolver', max_steps=15, tol=1e-3)
BROYDEN = dict(type='BroydenSolver', max_steps=15, tol=1e-3)
ADJOINT = dict(type='BroydenSolver', max_steps=15, tol=1e-4)

#: Arguments of the backbone for every kind of gradient.
GRADIENTS = {
    'implicit': dict(gradient=dict(type='ImplicitGradient', solver=ADJOINT)),
    'implicit, warm': dict(
        gradient=dict(type='ImplicitGradient', solver=ADJOINT, warm_start=True)
    ),
    'phantom series': dict(gradient=dict(type='PhantomGradient', steps=3)),
    'phantom unrolled': dict(
        gradient=dict(type='PhantomGradient', steps=3, unroll=True)
    ),
    'unrolled': dict(gradient=dict(type='UnrolledGradient', steps=4)),
    'reversible': dict(gradient=dict(type='ReversibleGradient', steps=3)),
    'shared inverse': dict(
        solver=BROYDEN, gradient=dict(type='SharedInverseGradient', fallback=None)
    ),
    # A limit that some samples keep, and others do not.
    'shared inverse, fallback': dict(
        solver=BROYDEN,
        gradient=dict(type='SharedInverseGradient', limit=0.165, fallback=ADJOINT),
    ),
}


def freeze_norms(model):
    """Let batch norms use the statistics they have, in neck and head too."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@cache
def contractive_weights(steps=30):
    """A backbone's weights whose f contracts, as that of a trained model does.

    Returns:
        dict[str, Tensor]: In float64, of the backbone of :func:`classifier`.
    """
    model = classifier().double()
    model.train()
    freeze_norms(model)
    model.set_jacobian(1.0)
    model.backbone.equilibrium.unroll_steps = 4
    optimizer = torch.optim.Adam(model.backbone.equilibrium.parameters(), lr=0.01)
    data = list(batches(20))
    for i in range(steps):
        images, labels = data[i % len(data)]
        loss = model(images, class_samples(labels), mode='loss')['loss_jac']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.backbone.state_dict()


def classifier(seed=0, **backbone):
    cfg = dict(
        type='ImplicitImageClassifier',
        backbone=dict(type='MDEQ', arch=ARCH, solver=SOLVER, norm_eval=True) | backbone,
        neck=[
            dict(
                type='MDEQFuseScales',
                in_channels=(4, 8),
                head_channels=(2, 2),
                out_channels=8,
            ),
            dict(type='GlobalAveragePooling'),
        ],
        head=dict(type='LinearClsHead', num_classes=4, in_channels=8),
        data_preprocessor=BaseDataPreprocessor(),
    )
    torch.manual_seed(seed)
    return build(cfg)


def segmentor(seed=0, **backbone):
    cfg = segmentor_config((4, 8), 3, arch=ARCH, solver=SOLVER, norm_eval=True)
    cfg['backbone'].update(backbone)
    # The mean over all pixels: where some are ignored, that over both processes is
    # another one than that over the batch.
    cfg['decode_head']['loss_decode'] = dict(type='CrossEntropyLoss')
    cfg['data_preprocessor'] = BaseDataPreprocessor()
    torch.manual_seed(seed)
    return build_segmentor(cfg | dict(type='ImplicitEncoderDecoder'))


def class_samples(labels):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(int(label)) for label in labels]


def batches(count=10, size=4, dtype=torch.float64, pixels=10):
    """Batches of images, of which the second halves are almost dark, and labels."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(size, 3, pixels, pixels, generator=generator).to(dtype)
        images[size // 2 :] *= 0.02
        yield images, torch.randint(0, 4, (size,), generator=generator)


def class_batch(images, labels):
    return dict(inputs=images, data_samples=class_samples(labels))


def segment_batch(images, labels):
    """Label maps that follow from the image and its label, without ignored pixels."""
    maps = (images[:, 0] > 0).long() + (labels % 2)[:, None, None]
    return dict(inputs=images, data_samples=label_maps(maps))


def train(model, data, wrapper=None, lr=0.05):
    """One step a batch.

    Args:
        model (nn.Module): Distributed or not, in training mode with frozen norms.
        data (Iterable[dict]): Batches.
        wrapper (Callable, optional): From the optimiser to its wrapper.

    Returns:
        dict: Weights, momentum, and the evaluations and losses of each step.
    """
    init_default_scope('mmpretrain')
    model.train()
    freeze_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    wrapper = (wrapper or OptimWrapper)(optimizer=optimizer)
    module = getattr(model, 'module', model)
    steps, adjoint_steps, losses = [], [], []
    for batch in data:
        logged = model.train_step(batch, wrapper)
        losses.append(logged['loss'].item())
        solution = module.backbone.last_solution
        steps.append(solution.steps.tolist())
        adjoint = solution.adjoint
        adjoint_steps.append([] if adjoint is None else adjoint.steps.tolist())
    momentum = [s['momentum_buffer'] for s in optimizer.state.values()]
    return dict(
        weights={k: v.detach().clone() for k, v in module.named_parameters()},
        momentum=[m.clone() for m in momentum],
        steps=steps,
        adjoint_steps=adjoint_steps,
        losses=losses,
    )
