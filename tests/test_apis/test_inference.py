"""From a config and a checkpoint to a model, and from a file to its input."""

from copy import deepcopy

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from mdeq_mm.apis.inference import first_test_dataset, load_image, load_model
from tests.helpers import EXACT, logits_of, project_classifier, project_golden

MEAN = [10.0, 20.0, 30.0]


def classification():
    """The config of the golden classifier, which solves exactly."""
    model = deepcopy(project_golden()['config'])
    model['backbone']['solver'] = EXACT
    return Config(
        dict(
            default_scope='mmpretrain',
            model=model,
            data_preprocessor=dict(mean=MEAN, std=[2.0] * 3, num_classes=4),
        )
    )


@pytest.fixture
def checkpoint(tmp_path):
    """Its weights in single precision, as a Runner saves them."""
    model = project_classifier().float()
    meta = dict(dataset_meta=dict(classes=('a', 'b', 'c', 'd')), epoch=3)
    path = tmp_path / 'golden.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.mark.parametrize('kind', [str, lambda path: path], ids=['str', 'Path'])
def test_a_checkpoint_fills_the_model(checkpoint, kind):
    model = load_model(classification(), kind(checkpoint), 'cpu')
    assert not model.training
    assert model.dataset_meta['classes'] == ('a', 'b', 'c', 'd')
    golden = project_classifier().float()
    images = project_golden()['input'].float()
    with torch.no_grad():
        found, expected = (logits_of(m, images) for m in (model, golden))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_the_preprocessor_is_that_of_the_config(checkpoint):
    """mmpretrain's configs have it beside the model."""
    model = load_model(classification(), checkpoint, 'cpu')
    data = model.data_preprocessor(dict(inputs=[torch.full((3, 4, 5), 40.0)]), False)
    assert data['inputs'][0, :, 0, 0].tolist() == [15, 10, 5]


def test_without_a_checkpoint_weights_are_random():
    """No file is looked for, whatever the config says."""
    cfg = classification()
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='absent.pth')
    models = [load_model(cfg, device='cpu') for _ in range(2)]
    first, second = (model.head.fc.weight for model in models)
    assert not torch.equal(first, second)
    assert models[0].dataset_meta == {} and not models[0].training


def test_the_config_is_left_as_it_was(checkpoint):
    cfg = classification()
    before = deepcopy(cfg.to_dict())
    load_model(cfg, checkpoint, 'cpu')
    assert cfg.to_dict() == before


def test_another_architecture_is_refused(checkpoint):
    cfg = classification()
    cfg.model.backbone.arch.channels = (4, 8, 16)
    cfg.model.neck[0].in_channels = (4, 8, 16)
    with pytest.raises(RuntimeError, match='of another architecture') as stop:
        load_model(cfg, checkpoint, 'cpu')
    assert str(stop.value).startswith(f'{checkpoint}: ')
    cfg = classification()
    cfg.model.head.num_classes = 7
    with pytest.raises(RuntimeError, match=r'head\.fc\.weight has shape \(4, 8\)'):
        load_model(cfg, checkpoint, 'cpu')


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'absent\.pth'):
        load_model(classification(), tmp_path / 'absent.pth', 'cpu')
    path = tmp_path / 'text.pth'
    path.write_text('weights')
    with pytest.raises(ValueError, match=f'{path} cannot be read as a checkpoint'):
        load_model(classification(), path, 'cpu')
    torch.save(dict(state_dict={3: torch.zeros(1)}), path)
    with pytest.raises(ValueError, match=f'{path}: the checkpoint has an entry 3'):
        load_model(classification(), path, 'cpu')


# Images


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    cv2.imwrite(str(path), pixels)
    return path, pixels


def segmentation(dataset):
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    from mmseg import datasets  # noqa: F401

    return ConfigDict(default_scope='mmseg', test_dataloader=dict(dataset=dataset))


def pipeline(annotations='LoadAnnotations'):
    return [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(60, 40)),
        dict(type=annotations),
        dict(type='PackSegInputs'),
    ]


WRAPPERS = {
    'plain': lambda data: data,
    'repeated': lambda data: dict(type='RepeatDataset', times=2, dataset=data),
    'concatenated': lambda data: dict(type='ConcatDataset', datasets=[data, data]),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_an_image_runs_through_the_test_pipeline(image, wrapper):
    path, pixels = image
    cfg = segmentation(WRAPPERS[wrapper](dict(pipeline=pipeline())))
    batch = load_image(cfg, path)
    (found,), (sample,) = batch['inputs'], batch['data_samples']
    expected = cv2.resize(pixels, (60, 40), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
    assert sample.ori_shape == (20, 30) and sample.img_shape == (40, 60)
    assert 'gt_sem_seg' not in sample


def test_annotations_are_left_out_however_they_are_named(image):
    path, _ = image
    cfg = segmentation(dict(pipeline=pipeline('mmseg.LoadAnnotations')))
    load_image(cfg, path)
    from mmseg.datasets import LoadAnnotations

    init_default_scope('mmseg')
    load_image(segmentation(dict(pipeline=pipeline(LoadAnnotations))), path)


def test_images_of_several_tasks_take_the_pipeline_of_the_first(tmp_path):
    """Its own toolbox's, whatever the scope of the config."""
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    path = tmp_path / 'a.png'
    cv2.imwrite(str(path), np.full((6, 9, 3), 7, np.uint8))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=4),
        dict(type='PackInputs'),
    ]
    tasks = dict(
        cls=dict(type='CustomDataset', pipeline=pipeline),
        seg=dict(type='BaseSegDataset', pipeline=[dict(type='PackSegInputs')]),
    )
    dataset = dict(type='MultiTaskDataset', datasets=tasks)
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
    assert first_test_dataset(cfg)['_scope_'] == 'mmpretrain'
    assert load_image(cfg, path)['inputs'][0].shape == (3, 4, 4)
    assert first_test_dataset(Config(dict())) is None
