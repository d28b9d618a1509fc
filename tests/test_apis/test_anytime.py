"""What a segmentor predicts after each evaluation of f."""

import pytest
import torch
from torch.nn.functional import interpolate

pytest.importorskip('mmseg', reason='mmseg is not installed')

from mdeq_mm.apis.anytime import predict_by_evaluation
from tests.helpers import (
    build_segmentor,
    label_maps,
    project_classifier,
    project_golden,
    segmentor_config,
)

CHANNELS, CLASSES, SIZE = (4, 8, 8), 4, (14, 11)
TO_THE_LIMIT = dict(type='PicardSolver', max_steps=7, tol=0)
BY_TOLERANCE = dict(type='PicardSolver', max_steps=40, tol=1e-6)


def segmentor(solver, out_indices=(0, 1, 2), channels=None, **options):
    """A segmentor in float64 with the contractive map of the golden numbers."""
    channels = channels or [CHANNELS[i] for i in out_indices]
    arch = project_golden()['config']['backbone']['arch']
    cfg = segmentor_config(
        channels,
        CLASSES,
        arch=arch,
        solver=solver,
        out_indices=out_indices,
        out_norm_cfg=None,
    )
    model = build_segmentor(cfg | options).double().eval()
    model.backbone.load_state_dict(project_classifier().backbone.state_dict())
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    # It makes single precision of all images.
    inner = model.data_preprocessor.forward
    model.data_preprocessor.forward = lambda data, training=False: dict(
        done := inner(data, training), inputs=done['inputs'].double()
    )
    return model


def batch_of(images):
    """As a data loader hands images (N, 3, H, W) to ``test_step``."""
    labels = torch.zeros(len(images), *SIZE, dtype=torch.long)
    return dict(inputs=list(images), data_samples=label_maps(labels))


@pytest.fixture
def images():
    return project_golden()['input'].double()


@pytest.fixture
def batch(images):
    return batch_of(images)


def iterates(model, images, count):
    """f(0), f(f(0)), ..., with f called by hand; maps of all branches."""
    backbone, states = model.backbone, []
    with torch.no_grad():
        injections = backbone.inject(images)
        maps = backbone._start(injections[0])
        for _ in range(count):
            maps = backbone.equilibrium.f(maps, *injections)
            states.append(maps)
    return states


def labels_of(model, maps):
    """What the head predicts from the branches of ``out_indices``."""
    with torch.no_grad():
        maps = model.backbone.outputs(maps)
        logits = model.decode_head(model.neck(maps) if model.with_neck else maps)
    return interpolate(logits, SIZE, mode='bilinear', align_corners=True).argmax(1)


def assert_follows_iterates(model, images, found):
    """Each snapshot is what f applied so many times gives, and not all are alike."""
    states = iterates(model, images, max(len(snapshots) for snapshots in found))
    for k, maps in enumerate(states):
        labels = labels_of(model, maps)
        for row, snapshots in enumerate(found):
            if k < len(snapshots):
                assert torch.equal(snapshots[k].labels, labels[row])
                assert snapshots[k].evaluations == k + 1
    assert any(not torch.equal(s[0].labels, s[-1].labels) for s in found)


def test_snapshots_are_those_of_plain_iteration(images, batch):
    model = segmentor(TO_THE_LIMIT)
    found = predict_by_evaluation(model, batch)
    assert [len(snapshots) for snapshots in found] == [7, 7, 7]
    assert_follows_iterates(model, images, found)


def test_outputs_are_normalised_as_the_backbone_does(images, batch):
    model = segmentor(TO_THE_LIMIT)
    raw = predict_by_evaluation(model, batch)
    for i, channels in enumerate(CHANNELS):
        norm = torch.nn.BatchNorm2d(channels, affine=False).double().eval()
        norm.running_mean.normal_(std=0.2)
        norm.running_var.uniform_(0.7, 1.4)
        model.backbone.out_norms[str(i)] = norm
    found = predict_by_evaluation(model, batch)
    assert_follows_iterates(model, images, found)
    assert any(
        not torch.equal(a[-1].labels, b[-1].labels)
        for a, b in zip(found, raw, strict=True)
    )


def test_residuals_are_those_of_the_trace(batch):
    model = segmentor(dict(type='AndersonSolver', max_steps=30, tol=1e-6))
    model.backbone.equilibrium.trace = True
    found = predict_by_evaluation(model, batch)
    solution = model.backbone.last_solution
    for row, snapshots in enumerate(found):
        trace = solution.trace[:, row]
        trace = trace[~trace.isnan()]
        assert [s.residual for s in snapshots] == trace.tolist()
        assert snapshots[-1].residual == solution.residual[row] <= 1e-6


@pytest.mark.parametrize('solver', ['PicardSolver', 'AndersonSolver', 'BroydenSolver'])
def test_images_leave_at_their_own_time(images, solver):
    """Rows stay with their images, and the others do not matter to one."""
    images[1] = 0
    images[2] *= 5
    model = segmentor(BY_TOLERANCE | dict(type=solver))
    found = predict_by_evaluation(model, batch_of(images))
    steps = model.backbone.last_solution.steps.tolist()
    assert [len(snapshots) for snapshots in found] == steps
    assert len(set(steps)) > 1 and max(steps) < 40
    for row, snapshots in enumerate(found):
        (alone,) = predict_by_evaluation(model, batch_of(images[row : row + 1]))
        assert len(alone) == len(snapshots)
        for a, b in zip(alone, snapshots, strict=True):
            assert torch.equal(a.labels, b.labels)
            assert a.residual == pytest.approx(b.residual, rel=1e-6)
    if solver == 'PicardSolver':
        assert_follows_iterates(model, images, found)


def test_finished_images_that_stay_are_not_watched(images):
    """A solver may keep them in its batch, as on a GPU."""
    images[1] = 0
    found, steps = [], []
    for drop in (True, False):
        model = segmentor(BY_TOLERANCE | dict(drop_finished=drop))
        found.append(predict_by_evaluation(model, batch_of(images)))
        steps.append(model.backbone.last_solution.steps.tolist())
    assert steps[0] == steps[1] and len(set(steps[0])) > 1
    assert [len(snapshots) for snapshots in found[1]] == steps[1]
    for dropped, kept in zip(*found, strict=True):
        for a, b in zip(dropped, kept, strict=True):
            assert a.residual == pytest.approx(b.residual, rel=1e-6)


@pytest.mark.parametrize('out_indices', [(2,), (0, 2)])
def test_some_of_the_branches(images, batch, out_indices):
    model = segmentor(TO_THE_LIMIT, out_indices)
    assert_follows_iterates(model, images, predict_by_evaluation(model, batch))


def test_with_a_neck(images, batch):
    neck = dict(
        type='FPN', in_channels=list(CHANNELS), out_channels=8, num_outs=3,
        norm_cfg=dict(type='BN'),
    )  # fmt: skip
    model = segmentor(TO_THE_LIMIT, channels=(8, 8, 8), neck=neck)
    assert model.with_neck
    assert_follows_iterates(model, images, predict_by_evaluation(model, batch))


def test_labels_are_of_the_size_of_the_file(batch):
    """Which the pipeline has scaled before."""
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(ori_shape=(28, 33)))
    found = predict_by_evaluation(segmentor(TO_THE_LIMIT), batch)
    assert {s.labels.shape for s in found[0]} == {(28, 33)}


def test_the_model_is_left_as_it_was(batch):
    model = segmentor(TO_THE_LIMIT)
    layer = model.backbone.equilibrium
    layer.observe = seen = lambda rows, maps, residual: None
    expected = model.test_step(batch)
    predict_by_evaluation(model, batch)
    assert layer.observe is seen
    for a, b in zip(expected, model.test_step(batch), strict=True):
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)

    model.decode_head.predict = None
    with pytest.raises(TypeError):
        predict_by_evaluation(model, batch)
    assert layer.observe is seen


def test_other_backbones_are_refused(batch):
    model = segmentor(TO_THE_LIMIT)
    model.backbone = torch.nn.Identity()
    with pytest.raises(ValueError, match=r'backbone\.type=Identity has no solver'):
        predict_by_evaluation(model, batch)


def test_classifiers_are_refused(batch):
    with pytest.raises(ValueError, match='ImageClassifier has no decode_head'):
        predict_by_evaluation(project_classifier(), batch)


def test_training_mode_is_refused(batch):
    """The backbone is watched in evaluation alone."""
    with pytest.raises(ValueError, match=r'call model\.eval\(\) first'):
        predict_by_evaluation(segmentor(TO_THE_LIMIT).train(), batch)
