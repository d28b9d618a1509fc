"""Both heads on one backbone give what two models with these weights give."""

from copy import deepcopy

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from mmengine.config import ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample

from mdeq_mm.registry import MODELS
from tests.helpers import EXACT, build, label_maps, project_classifier, project_golden

CHANNELS = (4, 8, 8)
CLASSES = 3
UNROLLED = dict(gradient=dict(type='UnrolledGradient', steps=4))
FEW_STEPS = dict(solver=dict(type='PicardSolver', max_steps=4, tol=0))


def fcn(channels=10, **options):
    return dict(
        type='FCNHead',
        in_channels=list(CHANNELS),
        in_index=[0, 1, 2],
        input_transform='resize_concat',
        channels=channels,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=CLASSES,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
        **options,
    )


AUXILIARY = [
    dict(
        type='FCNHead',
        in_channels=CHANNELS[i],
        in_index=i,
        channels=6,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=CLASSES,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4),
    )
    for i in (1, 2)
]
SLIDE = dict(mode='slide', crop_size=(16, 16), stride=(10, 12))


def parts(**backbone):
    """Backbone, neck and head of the project's golden classifier."""
    cfg = deepcopy(project_golden()['config'])
    exact = dict(solver=EXACT, gradient=dict(type='ImplicitGradient', solver=EXACT))
    return dict(
        backbone=cfg['backbone'] | exact | backbone,
        neck=cfg['neck'],
        head=cfg['head'],
    )


def joint(backbone=None, **options):
    """MultiTaskMDEQ in float64, in evaluation mode, whose map is contractive."""
    init_default_scope('mmseg')
    cfg = dict(
        type='MultiTaskMDEQ', decode_head=fcn(), **parts(**(backbone or {})), **options
    )
    model = MODELS.build(ConfigDict(cfg))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(('decode_head', 'auxiliary_head')):
                p.normal_(std=0.3)
    model.load_state_dict(project_classifier().state_dict(), strict=False)
    return model.double().eval()


def singles(model, **backbone):
    """The two models of one task each, with the weights of a joint one."""
    options = parts(**backbone)
    classifier = build(dict(type='ImageClassifier', **deepcopy(options)))
    init_default_scope('mmseg')
    cfg = dict(
        type='EncoderDecoder',
        backbone=options['backbone'],
        decode_head=fcn(),
        test_cfg=model.segmentor.test_cfg,
    )
    if hasattr(model, 'auxiliary_head'):
        many = isinstance(model.auxiliary_head, nn.ModuleList)
        cfg['auxiliary_head'] = AUXILIARY if many else AUXILIARY[0]
    segmentor = MODELS.build(ConfigDict(cfg))
    state = model.state_dict()
    for single in (classifier, segmentor):
        single.load_state_dict({k: state[k] for k in single.state_dict()})
        single.double().eval()
    return classifier, segmentor


def cls_batch(n=3, size=(18, 22)):
    """Images, and data samples with classes."""
    samples = [DataSample().set_gt_label(i % 4) for i in range(n)]
    for sample in samples:
        sample.set_metainfo(dict(task='cls'))
    return torch.randn(n, 3, *size).double(), samples


def seg_batch(n=2, size=(20, 26), task='seg'):
    """Images, and data samples with label maps, for both tasks with classes too."""
    samples = label_maps(torch.randint(0, CLASSES, (n, *size)))
    for i, sample in enumerate(samples):
        sample.set_metainfo(dict(task=task, pad_shape=size))
        if task == 'both':
            sample.gt_label = torch.tensor([(i + 1) % 4])
    return torch.randn(n, 3, *size).double(), samples


def count_solves(model):
    """A list that grows by the number of images with every solve."""
    solved = []
    model.backbone.equilibrium.register_forward_hook(
        lambda module, args, out: solved.append(len(args[1]))
    )
    return solved


def gradients(model, losses):
    model.zero_grad()
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_close(found, expected, tolerance=1e-12):
    assert set(found) == set(expected)
    for key in found:
        torch.testing.assert_close(
            found[key], expected[key], rtol=tolerance, atol=tolerance, msg=key
        )


# Losses


@pytest.mark.parametrize(
    'auxiliary', [None, AUXILIARY[0], AUXILIARY], ids=['none', 'one', 'two']
)
def test_losses_are_those_of_both_toolboxes(auxiliary):
    """In training, unrolled, with batch norms on the images of each task alone."""
    model = joint(UNROLLED, auxiliary_head=auxiliary).train()
    classifier, segmentor = (m.train() for m in singles(model, **UNROLLED))
    x, xs = cls_batch()
    y, ys = seg_batch()

    losses = model(dict(cls=x, seg=y), [*xs, *ys], mode='loss')
    expected = {f'cls.{k}': v for k, v in classifier.loss(x, xs).items()}
    expected |= segmentor.loss(y, ys)
    number = len(auxiliary) if isinstance(auxiliary, list) else auxiliary is not None
    assert len(losses) == 3 + 2 * number
    check_close(losses, expected)

    found = gradients(model, losses)
    one = gradients(classifier, classifier.loss(x, xs))
    other = gradients(segmentor, segmentor.loss(y, ys))
    assert set(found) == set(one) | set(other) == set(dict(model.named_parameters()))
    for name, grad in found.items():
        wanted = sum(g[name] for g in (one, other) if name in g)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_losses_at_the_equilibrium():
    model = joint()
    classifier, segmentor = singles(model)
    x, xs = cls_batch()
    y, ys = seg_batch()
    losses = model(dict(cls=x, seg=y), [*xs, *ys], mode='loss')
    expected = {f'cls.{k}': v for k, v in classifier.loss(x, xs).items()}
    check_close(losses, expected | segmentor.loss(y, ys), 1e-10)


def test_an_image_with_both_labels_costs_one_solve():
    """It has both losses, and the gradient is the sum of what each alone has."""
    model = joint(UNROLLED)
    model.backbone.equilibrium.train()
    solved = count_solves(model)
    y, ys = seg_batch(3, task='both')

    losses = model(y, ys, mode='loss')
    assert solved == [3]
    assert set(losses) == {'cls.loss', 'decode.loss_ce', 'decode.acc_seg'}
    found = gradients(model, losses)
    assert solved == [3]

    classifier, segmentor = singles(model, **UNROLLED)
    for single in (classifier, segmentor):
        single.backbone.equilibrium.train()
    one, other = classifier.loss(y, ys), segmentor.loss(y, ys)
    check_close(losses, {f'cls.{k}': v for k, v in one.items()} | other)
    one, other = gradients(classifier, one), gradients(segmentor, other)
    assert any(name in one and name in other for name in found)
    for name, grad in found.items():
        wanted = sum(g[name] for g in (one, other) if name in g)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12, msg=name)

    with torch.no_grad():
        model(y, ys, mode='predict')
    assert solved == [3, 3]


def test_loss_weights_scale_losses_and_switch_them_off():
    x, xs = cls_batch()
    y, ys = seg_batch()
    batch = dict(cls=x, seg=y), [*xs, *ys]
    plain = joint(auxiliary_head=AUXILIARY[0])
    expected = plain(*batch, mode='loss')

    weighted = joint(auxiliary_head=AUXILIARY[0], loss_weights=dict(cls=0.25, seg=3))
    weighted.load_state_dict(plain.state_dict())
    found = weighted(*batch, mode='loss')
    factors = {
        'cls.loss': 0.25,
        'decode.loss_ce': 3,
        'decode.acc_seg': 1,
        'aux.loss_ce': 3,
        'aux.acc_seg': 1,
    }
    check_close(found, {k: factors[k] * v for k, v in expected.items()})

    weighted.loss_weights['seg'] = 0.0
    losses = weighted(*batch, mode='loss')
    assert losses['decode.loss_ce'].item() == losses['aux.loss_ce'].item() == 0
    grads = gradients(weighted, losses)
    assert all(g.eq(0).all() for n, g in grads.items() if n.startswith('decode_head'))
    assert grads['head.fc.weight'].abs().max() > 1e-6
    # Those of the backbone are of the classification alone.
    alone = gradients(weighted, weighted(dict(cls=x), xs, mode='loss'))
    for name, grad in alone.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_groups_that_feed_one_head_are_averaged_by_their_samples():
    model = joint()
    (x, xs), (y, ys), (z, zs) = cls_batch(5), seg_batch(2), seg_batch(1, task='both')
    losses = model(dict(both=z, cls=x, seg=y), [*zs, *xs, *ys], mode='loss')
    cls, seg, both = (
        model({task: images}, samples, mode='loss')
        for task, images, samples in (('cls', x, xs), ('seg', y, ys), ('both', z, zs))
    )
    expected = {
        'cls.loss': (5 * cls['cls.loss'] + both['cls.loss']) / 6,
        'decode.loss_ce': (2 * seg['decode.loss_ce'] + both['decode.loss_ce']) / 3,
        'decode.acc_seg': (2 * seg['decode.acc_seg'] + both['decode.acc_seg']) / 3,
    }
    assert cls['cls.loss'] != both['cls.loss']
    check_close(losses, expected, 1e-9)


def test_accuracies_of_the_classification_head():
    """mmpretrain gives each as a list of one."""
    model = joint()
    model.head.cal_acc = True
    x, xs = cls_batch(4)
    losses = model(x, xs, mode='loss')
    wanted = model.head.loss(model.neck(model.backbone(x)), xs)
    assert isinstance(wanted['accuracy_top-1'], list)
    torch.testing.assert_close(
        losses['cls.accuracy_top-1'], wanted['accuracy_top-1'][0][0]
    )
    total, _ = model.parse_losses(losses)
    assert total.item() == losses['cls.loss'].item()


# Predictions


@pytest.mark.parametrize(
    'test_cfg', [dict(mode='whole'), SLIDE], ids=['whole', 'slide']
)
def test_predictions_are_those_of_both_toolboxes(test_cfg):
    model = joint(test_cfg=test_cfg)
    classifier, segmentor = singles(model)
    x, xs = cls_batch()
    y, ys = seg_batch()
    z, zs = seg_batch(1, task='both')
    wanted_cls = [*classifier.predict(x, deepcopy(xs)), *classifier.predict(z)]
    wanted_seg = [
        *segmentor.predict(y, deepcopy(ys)),
        *segmentor.predict(z, deepcopy(zs)),
    ]

    solved = count_solves(model)
    with torch.no_grad():
        out = model(dict(both=z, cls=x, seg=y), [*ys, *xs, *zs], mode='predict')
    # 20x26 pixels take 2x2 windows of 16x16.
    windows = test_cfg['mode'] == 'slide'
    assert solved == ([1, 1, 1, 1, 1, 3, 2, 2, 2, 2] if windows else [1, 3, 2])
    assert all(a is b for a, b in zip(out, [*ys, *xs, *zs], strict=True))

    for found, wanted in zip([*xs, *zs], wanted_cls, strict=True):
        torch.testing.assert_close(
            found.pred_score, wanted.pred_score, rtol=1e-10, atol=1e-10
        )
        assert found.pred_label.tolist() == wanted.pred_label.tolist()
    for found, wanted in zip([*ys, *zs], wanted_seg, strict=True):
        torch.testing.assert_close(
            found.seg_logits.data, wanted.seg_logits.data, rtol=1e-9, atol=1e-9
        )
        assert torch.equal(found.pred_sem_seg.data, wanted.pred_sem_seg.data)
        assert found.pred_sem_seg.data.unique().numel() > 1
    assert all('pred_sem_seg' not in s for s in xs)
    assert all('pred_score' not in s for s in ys)


def test_a_mixed_batch_keeps_its_order():
    """Each sample gets what it gets alone, whatever stands beside it."""
    model = joint()
    x, xs = cls_batch(3, size=(32, 28))
    y, ys = seg_batch(2, size=(24, 30))
    z, zs = seg_batch(2, size=(24, 30), task='both')
    order = [(z[1], zs[1]), (x[2], xs[2]), (y[0], ys[0]), (x[0], xs[0]),
             (z[0], zs[0]), (y[1], ys[1]), (x[1], xs[1])]  # fmt: skip

    def predict(items):
        images, samples = ([item[i] for item in items] for i in (0, 1))
        batch = dict(inputs=images, data_samples=deepcopy(samples))
        data = model.data_preprocessor(batch)
        inputs = {task: x.double() for task, x in data['inputs'].items()}
        with torch.no_grad():
            return model(inputs, data['data_samples'], mode='predict')

    together = predict(order)
    for i, item in enumerate(order):
        (alone,) = predict([item])
        assert ('pred_score' in alone, 'pred_sem_seg' in alone) != (False, False)
        if 'pred_score' in alone:
            torch.testing.assert_close(
                together[i].pred_score, alone.pred_score, rtol=1e-9, atol=1e-9
            )
        if 'pred_sem_seg' in alone:
            torch.testing.assert_close(
                together[i].seg_logits.data, alone.seg_logits.data, rtol=1e-9, atol=1e-9
            )


def test_a_tensor_of_images_is_split_by_task():
    model = joint()
    images = torch.randn(3, 3, 20, 26).double()
    (_, [a]), (_, [b]), (_, [c]) = (
        cls_batch(1),
        seg_batch(1),
        seg_batch(1, task='both'),
    )
    a_, b_, c_ = deepcopy([a, b, c])
    with torch.no_grad():
        model(images, [a, b, c], mode='predict')
        model(dict(cls=images[:1], seg=images[1:2]), [a_, b_], mode='predict')
        model(images[2:], [c_], mode='predict')
    for found, wanted in ((a, a_), (c, c_)):
        torch.testing.assert_close(found.pred_score, wanted.pred_score)
    for found, wanted in ((b, b_), (c, c_)):
        torch.testing.assert_close(found.seg_logits.data, wanted.seg_logits.data)
    assert 'seg_logits' not in a and 'pred_score' not in b


def test_images_alone_are_predicted_for_both_heads():
    model = joint()
    classifier, segmentor = singles(model)
    images = torch.randn(2, 3, 20, 26).double()
    with torch.no_grad():
        found = model(images, mode='predict')
        scores = [s.pred_score for s in classifier.predict(images)]
        logits = [s.seg_logits.data for s in segmentor.predict(images)]
    for sample, score, logit in zip(found, scores, logits, strict=True):
        torch.testing.assert_close(sample.pred_score, score, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sample.seg_logits.data, logit, rtol=1e-9, atol=1e-9)


def test_logits_of_a_tensor():
    model = joint()
    classifier, segmentor = singles(model)
    images = torch.randn(2, 3, 20, 26).double()
    solved = count_solves(model)
    with torch.no_grad():
        cls, seg = model(images)
        assert solved == [2]
        features = classifier.extract_feat(images)
        torch.testing.assert_close(cls, classifier.head(features))
        torch.testing.assert_close(seg, segmentor(images))


# Weights


def test_checkpoints_go_both_ways():
    """Names are those of the toolboxes' models, each of which finds all of its own."""
    model = joint(auxiliary_head=AUXILIARY)
    classifier, segmentor = singles(model)
    names = set(classifier.state_dict()) | set(segmentor.state_dict())
    assert set(model.state_dict()) == names
    # PyTorch does without the counters of batch norms.
    learned = {name for name in names if not name.endswith('num_batches_tracked')}

    state = model.state_dict()
    for single in (classifier, segmentor):
        for p in single.parameters():
            nn.init.zeros_(p)
        missing, unexpected = single.load_state_dict(state, strict=False)
        assert not missing
        assert set(unexpected) == names - set(single.state_dict())
        for name, value in single.state_dict().items():
            assert torch.equal(value, state[name])

    fresh = joint(auxiliary_head=AUXILIARY)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    missing, _ = fresh.load_state_dict(classifier.state_dict(), strict=False)
    assert set(missing) == learned - set(classifier.state_dict())
    missing, _ = fresh.load_state_dict(segmentor.state_dict(), strict=False)
    assert set(missing) == learned - set(segmentor.state_dict())
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name])


def seg_logits(model, images):
    with torch.no_grad():
        return torch.stack([s.seg_logits.data for s in model(images, mode='predict')])


@pytest.mark.parametrize(
    'test_cfg', [dict(mode='whole'), SLIDE], ids=['whole', 'slide']
)
def test_copies_share_nothing_with_the_original(test_cfg):
    model = joint(FEW_STEPS, test_cfg=test_cfg)
    images = torch.randn(1, 3, 20, 26).double()
    before = seg_logits(model, images)
    copies = (deepcopy(model), ExponentialMovingAverage(model).module)
    for copy in copies:
        assert copy.segmentor.backbone is copy.backbone is not model.backbone
        torch.testing.assert_close(seg_logits(copy, images), before)
        with torch.no_grad():
            copy.backbone.equilibrium.f.post_norms[0].bias.add_(1)
        assert not torch.allclose(seg_logits(copy, images), before)
        torch.testing.assert_close(seg_logits(model, images), before)


def test_parts_that_are_replaced_are_used():
    """As wrappers and quantisation replace them."""
    model, other = (joint(FEW_STEPS, test_cfg=SLIDE) for _ in range(2))
    with torch.no_grad():
        other.backbone.equilibrium.f.post_norms[0].bias.add_(1)
        other.decode_head.conv_seg.bias.add_(torch.arange(CLASSES))
    images = torch.randn(1, 3, 20, 26).double()
    model.backbone, model.decode_head = other.backbone, other.decode_head
    torch.testing.assert_close(seg_logits(model, images), seg_logits(other, images))
    assert set(model.state_dict()) == set(other.state_dict())


def test_modes_and_precision_reach_every_part():
    model = joint(FEW_STEPS, auxiliary_head=AUXILIARY)
    modules = [m for m in model.modules() if m is not model]
    assert not any(m.training for m in modules)
    assert all(m.training for m in model.train().modules())
    assert not any(m.training for m in model.eval().modules())
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        floats = [t for t in model.state_dict().values() if t.is_floating_point()]
        assert {t.dtype for t in floats} == {dtype}
        assert seg_logits(model, torch.randn(1, 3, 20, 26).to(dtype)).dtype == dtype
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)


def test_a_pretrained_backbone_is_loaded_once(tmp_path, monkeypatch):
    trained = project_classifier()
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=trained.state_dict()), path)
    init = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    model = joint(dict(init_cfg=init)).float()

    calls = []
    original = type(model.backbone).init_weights
    monkeypatch.setattr(
        type(model.backbone), 'init_weights', lambda s: (calls.append(s), original(s))
    )
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    model.init_weights()
    assert calls == [model.backbone]
    for name, value in trained.backbone.state_dict().items():
        torch.testing.assert_close(
            model.backbone.state_dict()[name].double(), value.double()
        )
    # The heads are drawn as their toolboxes draw them.
    assert 0.005 < model.decode_head.conv_seg.weight.std().item() < 0.02
    assert model.decode_head.conv_seg.bias.eq(0).all()
    assert 0 < model.head.fc.weight.std().item() < 0.02


# What is refused


@pytest.mark.parametrize(
    ('weights', 'field'),
    [
        (dict(cls=-0.5), "loss_weights['cls']=-0.5"),
        (dict(seg=float('nan')), "loss_weights['seg']=nan"),
        (dict(seg=float('inf')), "loss_weights['seg']=inf"),
        (dict(cls='1'), "loss_weights['cls']='1'"),
        (dict(seg=None), "loss_weights['seg']=None"),
        (dict(depth=1.0), "loss_weights['depth']=1.0"),
    ],
)
def test_bad_loss_weights(weights, field):
    with pytest.raises(ValueError) as refused:
        joint(loss_weights=weights)
    assert field in str(refused.value) and '0 or more' in str(refused.value)


def test_bad_calls():
    model = joint()
    x, xs = cls_batch()
    with pytest.raises(ValueError, match="mode='fit' is unknown"):
        model(x, xs, mode='fit')
    with pytest.raises(ValueError, match='data_samples=None'):
        model(x, mode='loss')
    with pytest.raises(ValueError, match='data_samples=None'):
        model(dict(cls=x), mode='predict')
