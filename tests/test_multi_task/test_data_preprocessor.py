"""Images of two tasks in one batch."""

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mdeq_mm.registry import MODELS
from tests.helpers import label_maps


def build(**options):
    init_default_scope('mmseg')
    return MODELS.build(
        dict(
            type='MultiTaskDataPreprocessor',
            cls=dict(
                type='ClsDataPreprocessor', mean=[10.0] * 3, std=[2.0] * 3, to_rgb=True
            ),
            seg=dict(
                type='SegDataPreProcessor',
                mean=[20.0] * 3,
                std=[4.0] * 3,
                size=(12, 10),
                pad_val=7,
                seg_pad_val=255,
            ),
        )
        | options
    )


@pytest.fixture
def batch():
    """Four images in mixed order: seg, cls, both, cls."""
    images = [
        torch.randint(0, 255, (3, *size)).byte()
        for size in ((8, 10), (6, 6), (12, 9), (6, 6))
    ]
    seg, both = (
        label_maps(torch.randint(0, 3, (1, *images[i].shape[1:])))[0] for i in (0, 2)
    )
    # As PackSegInputs stores what is in its meta_keys.
    both.set_metainfo(dict(gt_label=3))
    samples = [seg, DataSample().set_gt_label(1), both, DataSample().set_gt_label(0)]
    return images, samples


def test_each_task_has_its_own_normalisation(batch):
    images, samples = batch
    out = build()(dict(inputs=images, data_samples=samples), True)
    assert [s.task for s in out['data_samples']] == ['seg', 'cls', 'both', 'cls']
    assert {k: tuple(v.shape) for k, v in out['inputs'].items()} == dict(
        cls=(2, 3, 6, 6), seg=(1, 3, 12, 10), both=(1, 3, 12, 10)
    )
    for row, image in enumerate((images[1], images[3])):
        expected = (image.flip(0).float() - 10) / 2
        torch.testing.assert_close(out['inputs']['cls'][row], expected)
    expected = (images[0].float() - 20) / 4
    torch.testing.assert_close(out['inputs']['seg'][0, :, :8], expected)
    # Images are padded after they were normalised.
    assert out['inputs']['seg'][0, :, 8:].eq(7).all()
    labels = out['data_samples'][0].gt_sem_seg.data
    assert labels.shape == (1, 12, 10) and labels[:, 8:].eq(255).all()
    expected = (images[2].float() - 20) / 4
    torch.testing.assert_close(out['inputs']['both'][0, :, :, :9], expected)
    assert [s.gt_label.tolist() for s in out['data_samples'][1:]] == [[1], [3], [0]]
    assert 'gt_label' not in out['data_samples'][2].metainfo


def test_pairs_as_they_are_collated(batch):
    """Two items of two samples come as lists of the first and of the second ones."""
    images, samples = batch
    nested = dict(
        inputs=[images[:2], images[2:]], data_samples=[samples[:2], samples[2:]]
    )
    out = build()(nested, True)
    for found, wanted in zip(out['data_samples'], samples, strict=True):
        assert type(found) is type(wanted)
    assert [s.task for s in out['data_samples']] == ['seg', 'cls', 'both', 'cls']


def test_a_batch_of_one_task(batch):
    images, samples = batch
    rows = (1, 3)
    out = build()(
        dict(inputs=[images[i] for i in rows], data_samples=[samples[i] for i in rows])
    )
    assert list(out['inputs']) == ['cls'] and len(out['data_samples']) == 2


def test_mixup_keeps_the_task(batch):
    """Augmented batches have scores instead of classes."""
    images, samples = batch
    cls = dict(
        type='ClsDataPreprocessor',
        num_classes=4,
        to_onehot=True,
        batch_augments=dict(augments=[dict(type='Mixup', alpha=1.0)]),
    )
    out = build(cls=cls)(dict(inputs=images, data_samples=samples), True)
    mixed = [s for s in out['data_samples'] if s.task == 'cls']
    assert len(mixed) == 2
    for sample in mixed:
        assert sample.gt_score.sum().item() == pytest.approx(1)
        assert sample.gt_score[2:].eq(0).all()


def test_samples_are_needed():
    with pytest.raises(ValueError, match=r'2 images has 0 data samples.*PackSegInputs'):
        build()(dict(inputs=[torch.zeros(3, 4, 4)] * 2))


def test_an_image_for_both_tasks_needs_a_class():
    (sample,) = label_maps(torch.zeros(1, 8, 8).long())
    sample.set_metainfo(dict(task='both', img_path='street.png'))
    batch = dict(inputs=[torch.zeros(3, 8, 8)], data_samples=[sample])
    with pytest.raises(ValueError, match=r'street.png .* no gt_label.*meta_keys'):
        build()(batch, True)
    # What has no labels can still be predicted.
    assert build()(batch)['data_samples'][0].task == 'both'


def test_images_without_labels_are_for_both():
    out = build()(dict(inputs=[torch.zeros(3, 8, 8)], data_samples=[SegDataSample()]))
    assert list(out['inputs']) == ['both']
