"""The toolboxes' own configs learn with nothing but the backbone replaced."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import mdeq_mm  # noqa: F401
from tests.cityscapes_folder import write_cityscapes
from tests.helpers import load_tool

#: Three branches of 8x8, 4x4 and 2x2 pixels for images of 32x32.
SMALL = dict(channels=(24, 24, 24), num_groups=8, expansion=2, downsample_times=2)


class Witness(Hook):
    """Keeps the losses and the results of validations."""

    def __init__(self):
        self.losses, self.accuracies = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())

    def after_val_epoch(self, runner, metrics=None):
        self.accuracies.append(metrics['accuracy/top1'])


def shipped(toolbox, path):
    """A config as a toolbox ships it."""
    module = pytest.importorskip(toolbox, reason=f'{toolbox} is not installed')
    return Config.fromfile(Path(module.__file__).parent / '.mim' / 'configs' / path)


def train(cfg):
    for stage in ('train', 'val', 'test'):
        if loader := cfg[f'{stage}_dataloader']:
            loader.num_workers, loader.persistent_workers = 0, False
    cfg.randomness = dict(seed=0)
    witness = Witness()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(witness)
    runner.train()
    return witness


def classified(tmp_path, backbone, channels, epochs):
    """Accuracies of mmpretrain's ResNet-50 config on the digits, every third epoch."""
    cfg = shipped('mmpretrain', 'resnet/resnet50_8xb32_in1k.py')
    cfg.model.backbone = backbone
    cfg.model.head.in_channels = channels
    cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = 10
    load_tool('tools/dataset_converters/digits.py').write_digits(tmp_path / 'digits')
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=32),
        dict(type='PackInputs'),
    ]
    for stage, split in (('train', 'train'), ('val', 'test'), ('test', 'test')):
        cfg[f'{stage}_dataloader'].dataset = dict(
            type='CustomDataset',
            data_root=str(tmp_path / 'digits'),
            data_prefix=split,
            pipeline=pipeline,
        )
    cfg.train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=3)
    cfg.param_scheduler = dict(
        type='CosineAnnealingLR',
        T_max=epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    )
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=256)
    cfg.default_hooks.checkpoint.interval = epochs
    cfg.work_dir = str(tmp_path / 'work')
    return train(cfg).accuracies


def test_digits_in_three_epochs(tmp_path):
    """At 16 % after twelve epochs, version 0.1 was at chance here."""
    (accuracy,) = classified(tmp_path, dict(type='MDEQ', arch=SMALL), 24, 3)
    assert accuracy >= 80


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_digits_in_twelve_epochs(tmp_path):
    """ResNet-18 has 98 %."""
    accuracies = classified(tmp_path, dict(type='MDEQ', arch=SMALL), 24, 12)
    assert accuracies[-1] >= 95


def segmented(tmp_path, root, change):
    """Losses of mmseg's HRNet config on a folder of Cityscapes' layout."""
    cfg = shipped('mmseg', 'hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py')
    change(cfg.model)
    # Weights of ImageNet would have to be downloaded.
    cfg.model.pretrained = None
    cfg.model.data_preprocessor.size = cfg.crop_size = (64, 128)
    for entry in cfg.train_pipeline:
        if entry['type'] == 'RandomResize':
            entry['scale'] = (128, 64)
        if entry['type'] == 'RandomCrop':
            entry['crop_size'] = (64, 128)
    for stage in ('train', 'val', 'test'):
        cfg[f'{stage}_dataloader'].dataset.data_root = str(root)
    cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=40)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.work_dir = str(tmp_path / 'work')
    return train(cfg).losses


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_streets_as_fast_as_hrnet(tmp_path):
    """The loss after 40 iterations, averaged over the last ten, is at most HRNet's."""
    root = write_cityscapes(tmp_path / 'streets', dict(train=16, val=2))
    arch = dict(channels=(24, 48, 96, 192), expansion=4)

    def replace(model):
        model.backbone = dict(type='MDEQ', arch=arch)
        model.decode_head.in_channels = arch['channels']
        model.decode_head.channels = sum(arch['channels'])

    def plain(model):
        # SyncBN needs several processes; the Runner turns it into BN.
        assert model.backbone.type == 'HRNet'

    mdeq = segmented(tmp_path / 'mdeq', root, replace)
    hrnet = segmented(tmp_path / 'hrnet', root, plain)
    assert sum(mdeq[-10:]) <= sum(hrnet[-10:])
