"""Classifier and segmentor that tell of their equilibria."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.registry import init_default_scope

from mdeq_mm.implicit import Solution, Status
from mdeq_mm.models import ImplicitEncoderDecoder, ImplicitImageClassifier
from mdeq_mm.models.implicit_models.equilibrium_report import annotate
from mdeq_mm.registry import MODELS
from tests.helpers import (
    build_segmentor,
    label_maps,
    project_classifier,
    project_golden,
    segmentor_config,
)

SOLVER = dict(type='AndersonSolver', max_steps=8, tol=1e-3)
ARCH = dict(channels=(4, 8), num_groups=4, expansion=1, downsample_times=1)


@pytest.fixture
def classifier():
    """The contractive classifier of the golden numbers, as the class under test."""
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    init_default_scope('mmpretrain')
    plain = project_classifier(solver=SOLVER | dict(max_steps=30))
    config = project_golden()['config']
    backbone = config['backbone'] | dict(solver=SOLVER | dict(max_steps=30))
    model = MODELS.build(
        config | dict(type='ImplicitImageClassifier', backbone=backbone)
    ).double()
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.fixture
def images():
    return project_golden()['input'].double()


def class_samples(n):
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(i % 2) for i in range(n)]


@pytest.fixture
def segmentor():
    cfg = segmentor_config((4, 8), 3, arch=ARCH, solver=SOLVER)
    torch.manual_seed(0)
    return build_segmentor(cfg | dict(type='ImplicitEncoderDecoder')).eval()


def test_they_are_the_classes_of_the_toolboxes(classifier, segmentor):
    from mmpretrain.models import ImageClassifier
    from mmseg.models import EncoderDecoder

    assert isinstance(classifier, ImplicitImageClassifier)
    assert isinstance(classifier, ImageClassifier)
    assert isinstance(segmentor, ImplicitEncoderDecoder)
    assert isinstance(segmentor, EncoderDecoder)
    assert type(classifier).__name__ == 'ImplicitImageClassifier'


def test_importing_the_package_imports_no_toolbox():
    code = (
        'import sys, mdeq_mm; '
        "print([m for m in ('mmpretrain', 'mmseg') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                         check=True)  # fmt: skip
    assert out.stdout.strip().splitlines()[-1] == '[]'


def test_without_its_toolbox_it_says_what_to_install(monkeypatch):
    from mdeq_mm.models.implicit_models import lazy

    lazy._completed.cache_clear()
    monkeypatch.setattr(lazy, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'ImplicitImageClassifier .* mmpretrain.*'
                       'pip install onedl-mmpretrain'):  # fmt: skip
        ImplicitImageClassifier(backbone=dict(type='MDEQ'))
    lazy._completed.cache_clear()


def test_losses_of_a_classifier(classifier, images):
    classifier.train()
    samples = class_samples(3)
    plain = classifier(images, samples, mode='loss')
    assert set(plain) == {'loss'}
    classifier.set_jacobian(0.5, probes=2, seed=1)
    found = classifier(images, samples, mode='loss')
    assert set(found) == {'loss', 'loss_jac', 'jacobian'}
    assert not found['jacobian'].requires_grad
    assert found['loss_jac'].item() == pytest.approx(0.5 * found['jacobian'].item())
    # mmengine adds up what has "loss" in its name.
    total, logged = classifier.parse_losses(found)
    assert total.item() == pytest.approx((found['loss'] + found['loss_jac']).item())
    assert logged['jacobian'] == found['jacobian']


def test_gradients_are_the_sum_of_both(classifier, images):
    # Its statistics would move from pass to pass.
    classifier.train()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    samples = class_samples(3)
    parameters = list(classifier.parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    classifier.set_jacobian(2.0, seed=1)
    losses = classifier(images, samples, mode='loss')
    both = gradients(classifier.parse_losses(losses)[0])
    losses = classifier(images, samples, mode='loss')
    jacobian = gradients(losses['loss_jac'])
    classifier.set_jacobian(0)
    plain = gradients(classifier(images, samples, mode='loss')['loss'])
    assert any(g is not None and g.abs().max() > 1e-6 for g in jacobian)
    for whole, one, two in zip(both, plain, jacobian, strict=True):
        expected = sum(g for g in (one, two) if g is not None)
        torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-12)


def test_losses_of_a_segmentor(segmentor):
    segmentor.train()
    images = torch.rand(2, 3, 16, 16)
    samples = label_maps(torch.randint(0, 3, (2, 16, 16)))
    segmentor.set_jacobian(3.0, seed=1)
    found = segmentor(images, samples, mode='loss')
    assert found['loss_jac'].item() == pytest.approx(3 * found['jacobian'].item())
    assert 'decode.loss_ce' in found
    segmentor.set_jacobian(0)
    assert 'loss_jac' not in segmentor(images, samples, mode='loss')


def test_what_nobody_took_is_dropped(classifier, images):
    classifier.train()
    classifier.set_jacobian(1.0, seed=1)
    expected = classifier(images, class_samples(3), mode='loss')['jacobian']
    classifier(images[:1], mode='tensor')
    found = classifier(images, class_samples(3), mode='loss')['jacobian']
    # Of the same three samples, not of four.
    assert found.item() == pytest.approx(expected.item(), rel=0.2)
    assert len(classifier.backbone.equilibrium._jacobian_losses) == 0


def test_a_model_in_the_middle_of_a_training_can_be_copied(classifier, images):
    classifier.train()
    classifier.set_jacobian(1.0)
    classifier(images, mode='tensor')
    other = copy.deepcopy(classifier)
    assert 'loss_jac' in other(images, class_samples(3), mode='loss')


def test_predictions_of_a_classifier_tell_of_their_own_solve(classifier, images):
    with torch.no_grad():
        samples = classifier(images, class_samples(3), mode='predict')
        solution = classifier.backbone.last_solution
        alone = classifier(images[:1], mode='predict')[0]
    for i, sample in enumerate(samples):
        assert sample.equilibrium_residual == solution.residual[i].item()
        assert sample.equilibrium_status == 'converged'
        assert sample.equilibrium_steps == solution.steps[i].item()
    assert alone.equilibrium_residual == pytest.approx(samples[0].equilibrium_residual)
    assert 'pred_label' in alone


def test_predictions_of_a_segmentor(segmentor):
    images = torch.rand(2, 3, 16, 16)
    samples = label_maps(torch.zeros(2, 16, 16).long())
    with torch.no_grad():
        found = segmentor(images, samples, mode='predict')
    solution = segmentor.backbone.last_solution
    for i, sample in enumerate(found):
        assert sample.equilibrium_residual == solution.residual[i].item()
        status = Status(solution.status[i].item()).name.lower()
        assert sample.equilibrium_status == status


def test_sliding_windows_tell_the_worst(segmentor):
    segmentor.test_cfg.update(mode='slide', crop_size=(16, 16), stride=(16, 8))
    images = torch.rand(2, 3, 16, 32)
    samples = label_maps(torch.zeros(2, 16, 32).long())
    seen = []
    segmentor.backbone.equilibrium.register_forward_hook(
        lambda layer, args, out: seen.append(layer.last_solution)
    )
    with torch.no_grad():
        found = segmentor(images, samples, mode='predict')
    assert len(seen) == 3
    for i, sample in enumerate(found):
        assert sample.equilibrium_residual == max(s.residual[i].item() for s in seen)
        assert sample.equilibrium_steps == sum(s.steps[i].item() for s in seen)
        assert sample.equilibrium_status == 'max_steps'


class Mine(ImplicitImageClassifier):
    """A user's own."""


@pytest.mark.parametrize('stepped', [False, True])
@pytest.mark.parametrize('kind', ['classifier', 'segmentor'])
def test_pickles(request, kind, stepped, tmp_path):
    model = request.getfixturevalue(kind)
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    if stepped:
        model.train().set_jacobian(1.0)
        samples = label_maps(torch.zeros(2, 16, 16).long())
        if kind == 'classifier':
            samples = class_samples(2)
        model.parse_losses(model(images, samples, mode='loss'))[0].backward()
        model(images, mode='tensor')
        model.eval()
    expected = model(images, mode='tensor')
    torch.save(model, tmp_path / 'model.pth')
    loaded = torch.load(tmp_path / 'model.pth', weights_only=False)
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert torch.equal(expected[0], other(images, mode='tensor')[0])
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    # In a process that has made no such model yet.
    code = (
        'import sys, torch; '
        'model = torch.load(sys.argv[1], weights_only=False); '
        "print(type(model).__name__, 'parametrizations' in str(model.backbone))"
    )
    out = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'model.pth')],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split()[-2:] == [type(model).__name__, 'True']


def test_classes_of_users_pickle(classifier):
    config = project_golden()['config']
    mine = Mine(config['backbone'], config['neck'], config['head'])
    again = pickle.loads(pickle.dumps(mine))
    assert isinstance(again, Mine) and type(again) is type(mine)


@pytest.mark.parametrize('kind', ['classifier', 'segmentor'])
def test_predictions_in_several_threads(request, kind):
    """Each tells of its own solve, as in one thread."""
    model = request.getfixturevalue(kind)
    dtype = next(model.parameters()).dtype
    images = [torch.randn(1, 3, 16, 16, dtype=dtype) * 2**i for i in range(4)]

    @torch.no_grad()
    def predict(image):
        samples = label_maps(torch.zeros(1, 16, 16).long())
        if kind == 'classifier':
            samples = class_samples(1)
        (found,) = model(image, samples, mode='predict')
        scores = found.pred_score if kind == 'classifier' else found.seg_logits.data
        return scores, found.equilibrium_residual, found.equilibrium_steps

    expected = [predict(image) for image in images]
    assert len({residual for _, residual, _ in expected}) == len(images)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predict, images * 10))
    for (scores, *report), (wanted, *own) in zip(found, expected * 10, strict=True):
        assert torch.equal(scores, wanted) and report == own
    assert not model.backbone.equilibrium._forward_hooks


def solution(residual, status):
    n = len(residual)
    return Solution(
        value=torch.zeros(n, 1),
        residual=torch.tensor(residual),
        steps=torch.full((n,), 4),
        status=torch.tensor([int(s) for s in status]),
    )


def test_the_worst_status_and_the_worst_residual_count():
    from mmengine.structures import BaseDataElement

    solves = [
        solution([0.1, 0.2], [Status.CONVERGED, Status.STALLED]),
        solution([0.3, 0.1], [Status.MAX_STEPS, Status.CONVERGED]),
    ]
    one, two = annotate([BaseDataElement(), BaseDataElement()], solves)
    assert one.equilibrium_residual == pytest.approx(0.3)
    assert (one.equilibrium_status, two.equilibrium_status) == ('max_steps', 'stalled')
    assert one.equilibrium_steps == two.equilibrium_steps == 8


def test_solves_of_other_batches_speak_for_all():
    from mmengine.structures import BaseDataElement

    solves = [solution([0.1, 0.2, 0.7], [Status.CONVERGED] * 2 + [Status.DIVERGED])]
    samples = annotate([BaseDataElement(), BaseDataElement()], solves)
    for sample in samples:
        assert sample.equilibrium_residual == pytest.approx(0.7)
        assert sample.equilibrium_status == 'diverged'


@pytest.mark.parametrize('kind', ['cls', 'seg'])
def test_test_time_augmentation_tells_the_worst(kind, classifier, segmentor, images):
    if kind == 'cls':
        init_default_scope('mmpretrain')
        tta = MODELS.build(dict(type='ImplicitClsTTAModel', module=classifier))
        versions = [images, images.flip(3)]
        batches = [class_samples(3) for _ in versions]
    else:
        init_default_scope('mmseg')
        tta = MODELS.build(dict(type='ImplicitSegTTAModel', module=segmentor))
        versions = [torch.rand(2, 3, 16, 16) for _ in range(2)]
        batches = [label_maps(torch.zeros(2, 16, 16).long()) for _ in versions]
        for batch in batches:
            for sample in batch:
                sample.set_metainfo(dict(img_path='x'))
    tta.eval()
    with torch.no_grad():
        parts = [tta.module(v, b, mode='predict')
                 for v, b in zip(versions, batches, strict=True)]  # fmt: skip
        expected = [
            (
                max(s.equilibrium_residual for s in pair),
                sum(s.equilibrium_steps for s in pair),
            )
            for pair in zip(*parts, strict=True)
        ]
        merged = tta.merge_preds([list(pair) for pair in zip(*parts, strict=True)])
    found = [(s.equilibrium_residual, s.equilibrium_steps) for s in merged]
    assert found == expected


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(weight=-1.0), ValueError, 'weight=-1.0'),
        (dict(weight='a'), TypeError, 'weight must be a number'),
        (dict(weight=1.0, probes=0), ValueError, 'probes=0'),
    ],
)
def test_bad_settings_are_refused(segmentor, arguments, error, words):
    with pytest.raises(error, match=words):
        segmentor.set_jacobian(**arguments)
