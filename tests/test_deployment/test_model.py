"""Deployable models: the numbers of the models that they are made of."""

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, softmax
from torch.nn.utils import prune

from mdeq_mm.deployment import DeployableModel
from mdeq_mm.deployment.model import FixedStepMDEQ, normalisation
from mdeq_mm.implicit import AndersonSolver
from tests.helpers import build, logits_of, project_classifier, relative
from tests.test_deployment.models import digits, small_classifier, small_segmentor

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

BROYDEN = dict(type='BroydenSolver', max_steps=6, tol=1e-3, norm='abs')
RESNET = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=5, in_channels=512),
)


@pytest.mark.parametrize('kind', ['anderson', 'picard'])
@pytest.mark.parametrize('size', [(30, 24), (31, 27)], ids=str)
@torch.no_grad()
def test_scores_and_residual_of_a_contractive_model(kind, size):
    model = project_classifier()
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    deployable = DeployableModel(model, 9, kind, residual=True)
    assert deployable.output_names == ('scores', 'residual')
    scores, residual = deployable(images)
    model.backbone.equilibrium.eval_solver = deployable.solver
    expected = softmax(logits_of(model, images), dim=1)
    solution = model.backbone.last_solution
    assert (scores - expected).abs().max() < 1e-10
    assert (residual - solution.residual).abs().max() < 1e-10
    assert solution.residual.max() < 0.05 and solution.steps.tolist() == [9] * 3


@torch.no_grad()
def test_logits_of_a_segmentor_at_the_size_of_the_images():
    model = small_segmentor().double()
    images = digits(2, (21, 14)).double()
    (logits,) = DeployableModel(model, 5)(images)
    model.backbone.equilibrium.eval_solver = DeployableModel(model, 5).solver
    metas = [dict(img_shape=(21, 14), ori_shape=(21, 14), pad_shape=(21, 14))] * 2
    assert (logits - model.encode_decode(images, metas)).abs().max() < 1e-10
    small = model(images, mode='tensor')
    assert small.shape[2:] == (11, 7)
    size = images.shape[2:]
    whole = interpolate(small, size, mode='bilinear', align_corners=True)
    assert (logits - whole).abs().max() < 1e-10


@torch.no_grad()
def test_several_tasks_have_outputs_of_both():
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    classifier, segmentor = small_classifier().double(), small_segmentor().double()
    images = digits(2, (16, 16)).double()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.neck = classifier.backbone, classifier.neck
            self.head, self.decode_head = classifier.head, segmentor.decode_head

    deployable = DeployableModel(Both().eval(), 3, residual=True)
    assert deployable.output_names == ('scores', 'logits', 'residual')
    scores, logits, _ = deployable(images)
    alone = DeployableModel(classifier, 3)(images)[0]
    assert torch.equal(scores, alone)
    # The neck is the classifier's alone.
    maps, _ = deployable.backbone(images)
    expected = interpolate(
        segmentor.decode_head(maps), (16, 16), mode='bilinear', align_corners=True
    )
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_weights_are_normalised_once_and_the_model_stays_as_it_is():
    backbone = project_classifier().backbone
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    deployed = FixedStepMDEQ(backbone, AndersonSolver(3))
    names = deployed.state_dict()
    assert not any('parametrizations' in name for name in names)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@torch.no_grad()
def test_what_was_done_to_f_is_exported():
    backbone = project_classifier().backbone
    f = backbone.equilibrium.f
    f.post_norms[0] = nn.Sequential(f.post_norms[0], nn.Tanh())
    f.fusion.register_forward_hook(lambda module, inputs, out: [0.5 * m for m in out])
    prune.l1_unstructured(f.fusion.paths[0]['1'].conv, 'weight', amount=0.5)
    solver = AndersonSolver(4, tol=0)
    backbone.equilibrium.eval_solver = solver
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = backbone(images)
    module = FixedStepMDEQ(backbone, solver)
    assert relative(module(images)[0], expected) < 1e-11
    exported = torch.export.export(module, (images,)).module()
    assert relative(exported(images)[0], expected) < 1e-11
    narrow = module.float()(images.float())[0]
    assert all(m.dtype == torch.float32 for m in narrow)


@torch.no_grad()
def test_preprocessing_takes_images_of_0_to_255():
    model = small_classifier()
    mean, std = normalisation(model)
    images = digits(2, (16, 16))
    raw = images * std + mean
    assert raw.min() >= -1e-3 and 200 < raw.max() < 257
    expected = DeployableModel(model, 2)(images)[0]
    found = DeployableModel(model, 2, preprocessing=True)(raw)[0]
    assert (found - expected).abs().max() < 1e-6


def test_broyden_becomes_anderson_with_its_limit_and_norm():
    deployable = DeployableModel(small_classifier(eval_solver=BROYDEN))
    assert type(deployable.solver).__name__ == 'AndersonSolver'
    assert (deployable.solver.max_steps, deployable.solver.norm) == (6, 'abs')


@torch.no_grad()
def test_models_without_equilibrium_are_taken_as_they_are():
    model = build(RESNET).eval()
    images = torch.randn(2, 3, 32, 32)
    deployable = DeployableModel(model)
    assert deployable.solver is None and deployable.output_names == ('scores',)
    assert torch.equal(deployable(images)[0], softmax(logits_of(model, images), 1))
    with pytest.raises(ValueError, match='no equilibrium, and so no residual'):
        DeployableModel(model, residual=True)


def test_refusals():
    model = small_classifier()
    with pytest.raises(ValueError, match='training mode'):
        DeployableModel(model.train())
    model.eval()
    with pytest.raises(ValueError, match='steps'):
        DeployableModel(model, steps=0)
    with pytest.raises(ValueError, match="solver='broyden' is unknown"):
        DeployableModel(model, solver='broyden')

    model.data_preprocessor = nn.Identity()
    with pytest.raises(ValueError, match='has no mean and std'):
        DeployableModel(model, preprocessing=True)

    class Cascade(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.decode_head = model.backbone, nn.ModuleList()

    with pytest.raises(ValueError, match='several decode heads'):
        DeployableModel(Cascade().eval())
    del Cascade
    headless = nn.Module()
    headless.backbone = model.backbone
    with pytest.raises(ValueError, match='neither head nor decode_head'):
        DeployableModel(headless.eval())
    model.backbone = nn.Sequential(model.backbone)
    with pytest.raises(ValueError, match='only a backbone of type MDEQ'):
        DeployableModel(model)


@torch.no_grad()
def test_a_broken_image_has_scores_of_nan_as_in_the_model():
    model = project_classifier()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    images[1, 0, 0, 0] = torch.nan
    deployable = DeployableModel(model, 6, residual=True)
    scores, residual = deployable(images)
    model.backbone.equilibrium.eval_solver = deployable.solver
    expected = softmax(logits_of(model, images), dim=1)
    assert scores[1].isnan().all() and residual[1].isinf()
    assert torch.allclose(scores, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
