"""tools/train.py and tools/test.py, and the toolboxes' own, on real configs.

Most tests call the scripts' main functions in this process; a few start them as
users do. Those on ImageNet's layout train MDEQ-small on images of 64 pixels.
"""

import json
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmengine
import mmpretrain
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict

from tests.image_folders import CIFAR10, IMAGENET, write_class_folder

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'
SMALL = ROOT / 'configs/imagenet/mdeq-small_4xb32-100e_in1k.py'
RESNET = ROOT / 'configs/cifar10/resnet50_2xb64-50e_cifar10.py'

# No workers: starting them takes longer than loading these images.
IN_PROCESS = [f'{stage}_dataloader.num_workers=0' for stage in ('train', 'val', 'test')]
ONE_EPOCH = [*IN_PROCESS, 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1']


@pytest.fixture(scope='module')
def cifar10_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('cifar10')
    return write_class_folder(root, CIFAR10, dict(train=4, test=3), size=32)


@pytest.fixture(scope='module')
def imagenet_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('imagenet')
    return write_class_folder(root, IMAGENET, dict(train=2, val=2), size=64)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the main function of tools/<name>.py with a command line."""
    # Where work dirs go by default, and where no data lies.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    # Set by the tools themselves; taken back after the test.
    monkeypatch.setenv('LOCAL_RANK', '0')

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, args)])
        # Python's own standard library has a package called test.
        monkeypatch.delitem(sys.modules, name, raising=False)
        import_module(name).main()

    return run


@pytest.fixture
def refused(call):
    """Call a tool that has to end in one sentence; return the sentence."""

    def run(name, *args):
        with pytest.raises(SystemExit) as stop:
            call(name, *args)
        assert isinstance(stop.value.code, str), 'argparse refused the command line'
        assert stop.value.code.startswith(f'{name}.py: error: ')
        assert '\n' not in stop.value.code
        return stop.value.code

    return run


@pytest.fixture(scope='module')
def trained(cifar10_folder, tmp_path_factory):
    """Work dir of an MDEQ that the script has trained for an epoch."""
    work_dir = tmp_path_factory.mktemp('trained')
    shell('train', TINY, '--data-root', cifar10_folder, '--work-dir', work_dir,
          '--cfg-options', *ONE_EPOCH)  # fmt: skip
    return work_dir


def shell(name, *args, folder=ROOT / 'tools'):
    """Start a script as a user does; return what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    result = subprocess.run(
        [sys.executable, folder / f'{name}.py', *map(str, args)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def scalars(work_dir):
    """All records that the last run in a work dir has logged."""
    path = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_and_test_from_the_shell(trained, cifar10_folder, tmp_path):
    assert (trained / 'epoch_1.pth').is_file()
    assert 'accuracy/top1' in scalars(trained)[-1]
    dumped = Config.fromfile(trained / TINY.name)
    assert dumped.train_dataloader.dataset.data_root == str(cifar10_folder)

    out, shown = tmp_path / 'predictions.pkl', tmp_path / 'shown'
    shell('test', TINY, trained / 'epoch_1.pth', '--data-root', cifar10_folder,
          '--work-dir', tmp_path, '--out', out, '--show-dir', shown)  # fmt: skip
    predictions = mmengine.load(out)
    assert len(predictions) == 3
    assert predictions[0]['pred_score'].shape == (10,)
    assert len(list(shown.glob('*.png'))) == 3


def toolbox_options(data_root):
    roots = [f'{s}_dataloader.dataset.data_root={data_root}' for s in ('train', 'val')]
    return [
        *ONE_EPOCH,
        *roots,
        f'test_dataloader.dataset.data_root={data_root}',
        'train_dataloader.dataset.pipeline.1.scale=64',
        'val_dataloader.dataset.pipeline.1.scale=72',
        'val_dataloader.dataset.pipeline.2.crop_size=64',
        'test_dataloader.dataset.pipeline.1.scale=72',
        'test_dataloader.dataset.pipeline.2.crop_size=64',
    ]


def test_the_toolbox_trains_resumes_and_tests_our_configs(imagenet_folder, tmp_path):
    """mmpretrain's own scripts, whose way to override data_root is three options."""
    scripts = Path(mmpretrain.__file__).parent / '.mim' / 'tools'
    if not scripts.is_dir():
        pytest.skip('mmpretrain was installed without its tools')
    options = toolbox_options(imagenet_folder)
    common = ['--work-dir', tmp_path, '--no-persistent-workers', '--cfg-options']
    shell('train', SMALL, *common, *options, folder=scripts)
    assert (tmp_path / 'epoch_1.pth').is_file()

    log = shell('train', SMALL, '--resume', *common, *options,
                'train_cfg.max_epochs=2', folder=scripts)  # fmt: skip
    assert 'resumed epoch: 1, iter: 1' in log
    assert 'Training unrolled' not in log
    assert (tmp_path / 'epoch_2.pth').is_file()

    out = tmp_path / 'metrics.json'
    shell('test', SMALL, tmp_path / 'epoch_2.pth', '--work-dir', tmp_path, '--out', out,
          '--out-item', 'metrics', '--cfg-options', *options,
          folder=scripts)  # fmt: skip
    assert {'accuracy/top1', 'accuracy/top5', 'equilibrium/converged'} <= set(
        mmengine.load(out)
    )


def test_resume_goes_on_where_training_ended(call, trained, cifar10_folder, tmp_path):
    """From a named checkpoint, and then from the latest in the work dir."""
    first = trained / 'epoch_1.pth'
    common = [TINY, '--data-root', cifar10_folder, '--work-dir', tmp_path]
    call('train', *common, '--resume', first, '--no-validate', '--cfg-options',
         *IN_PROCESS, 'train_cfg.max_epochs=2')  # fmt: skip
    assert not (tmp_path / 'epoch_1.pth').exists()
    assert (tmp_path / 'epoch_2.pth').is_file()
    assert not any('accuracy/top1' in record for record in scalars(tmp_path))

    call('train', *common, '--resume', '--cfg-options', *IN_PROCESS,
         'train_cfg.max_epochs=3', 'default_hooks.logger.interval=1')  # fmt: skip
    last = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    assert (last['meta']['epoch'], last['meta']['iter']) == (3, 3)
    # Runs that start within one second share a folder of records.
    assert {r['iter'] for r in scalars(tmp_path) if 'loss' in r} in ({3}, {2, 3})


def test_metrics_and_tta(call, trained, cifar10_folder, tmp_path):
    """A mirrored image beside the image changes scores, and not what is counted."""
    checkpoint = trained / 'epoch_1.pth'
    common = [TINY, checkpoint, '--data-root', cifar10_folder, '--work-dir', tmp_path]
    options = ['--cfg-options', *IN_PROCESS]
    call('test', *common, '--out', tmp_path / 'metrics.json', '--out-item', 'metrics',
         *options)  # fmt: skip
    found = mmengine.load(tmp_path / 'metrics.json')
    assert 0 <= found.pop('accuracy/top1') <= 100
    # How the solves ended stands beside it.
    assert set(found) == {
        f'equilibrium/{name}'
        for name in ('residual', 'residual_p95', 'evaluations', 'converged')
    }
    assert found['equilibrium/evaluations'] == 12

    scores = []
    for tta in ([], ['--tta']):
        call('test', *common, *tta, '--out', tmp_path / 'pred.pkl', *options)
        predictions = mmengine.load(tmp_path / 'pred.pkl')
        scores.append(torch.stack([p['pred_score'] for p in predictions]))
    assert scores[0].shape == scores[1].shape == (3, 10)
    assert not torch.allclose(*scores)
    torch.testing.assert_close(scores[1].sum(1), torch.ones(3))


def test_auto_scale_lr(call, cifar10_folder, tmp_path):
    """One process with 64 images instead of the two that the schedule is for."""
    call('train', RESNET, '--data-root', cifar10_folder, '--work-dir', tmp_path,
         '--auto-scale-lr', '--no-validate', '--cfg-options', *ONE_EPOCH)  # fmt: skip
    assert [r['lr'] for r in scalars(tmp_path)] == [pytest.approx(1e-3 * 64 / 128)]


def write_mmseg_config(folder):
    """An mmseg config with an MDEQ, two images of training and testing data."""
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for i in range(2):
            labels = np.zeros((33, 40), np.uint8)
            labels[:, 20 + i :] = 1
            noise = rng.integers(0, 64, (33, 40, 1), np.uint8)
            image = np.repeat(labels[..., None] * 128 + noise, 3, axis=2)
            cv2.imwrite(str(folder / 'images' / split / f'{i}.jpg'), image)
            cv2.imwrite(str(folder / 'annotations' / split / f'{i}.png'), labels)
    path = folder / 'mdeq_mmseg.py'
    path.write_text(
        f"""
default_scope = 'mmseg'
custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[127.0] * 3, std=[64.0] * 3, bgr_to_rgb=True,
        pad_val=0, seg_pad_val=255, size_divisor=4),
    backbone=dict(
        type='MDEQ', arch='cifar-tiny',
        gradient=dict(type='UnrolledGradient', steps=3)),
    decode_head=dict(
        type='FCNHead', in_channels=(24, 24), in_index=(0, 1), channels=8,
        input_transform='resize_concat', num_convs=1, concat_input=False,
        num_classes=2, norm_cfg=dict(type='BN'), align_corners=False),
    test_cfg=dict(mode='whole'))
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
dataset = dict(
    type='BaseSegDataset', data_root={str(folder)!r},
    metainfo=dict(classes=('dark', 'bright'), palette=[[0, 0, 0], [255, 255, 0]]))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=load + [dict(type='PackSegInputs')]))
val_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        pipeline=load + [dict(type='PackSegInputs')]))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    visualization=dict(type='SegVisualizationHook'))
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(by_epoch=False)
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]
"""
    )
    return path


def test_mmseg_configs_train_resume_and_test(call, tmp_path):
    pytest.importorskip('mmseg')
    config = write_mmseg_config(tmp_path)
    work_dir = tmp_path / 'mmseg'
    call('train', config, '--work-dir', work_dir)
    call('train', config, '--work-dir', work_dir, '--resume', '--cfg-options',
         'train_cfg.max_iters=3', 'default_hooks.logger.interval=1')  # fmt: skip
    assert [r['iter'] for r in scalars(work_dir) if 'loss' in r] == [3]

    checkpoint = work_dir / 'iter_3.pth'
    labels, shown = tmp_path / 'labels', tmp_path / 'shown'
    call('test', config, checkpoint, '--work-dir', tmp_path / 'tested', '--out', labels,
         '--show-dir', shown)  # fmt: skip
    assert sorted(p.name for p in labels.iterdir()) == ['0.png', '1.png']
    assert len(list(shown.rglob('*.png'))) == 2

    call('test', config, checkpoint, '--work-dir', tmp_path / 'augmented', '--tta',
         '--out', tmp_path / 'metrics.json', '--out-item', 'metrics')  # fmt: skip
    assert 0 <= mmengine.load(tmp_path / 'metrics.json')['mIoU'] <= 100


# What is refused, and with which words.


def test_absent_files_are_refused(refused, trained, cifar10_folder, tmp_path):
    absent = tmp_path / 'absent.pth'
    assert 'absent.py' in refused('train', 'configs/absent.py')
    assert 'absent.py' in refused('test', 'configs/absent.py', trained / 'epoch_1.pth')
    assert 'absent.pth' in refused('test', TINY, absent)
    assert 'absent.pth' in refused('train', TINY, '--resume', absent)
    assert 'absent.pth' in refused(
        'train', TINY, '--cfg-options', f'load_from={absent}'
    )

    (tmp_path / 'last_checkpoint').write_text(str(absent))
    said = refused('train', TINY, '--data-root', cifar10_folder, '--resume',
                   '--work-dir', tmp_path)  # fmt: skip
    assert 'last_checkpoint' in said and '--resume CHECKPOINT' in said


def test_an_absent_data_root_is_refused(refused, trained, tmp_path):
    absent = tmp_path / 'absent'
    for command in (['train', TINY], ['test', TINY, trained / 'epoch_1.pth']):
        said = refused(*command, '--data-root', absent, '--work-dir', tmp_path)
        assert f"{command[0]}_dataloader.dataset.data_root is '{absent}'" in said
        assert '--data-root' in said


def test_a_data_root_of_another_layout_is_refused(refused, trained, tmp_path):
    common = ['--data-root', tmp_path, '--work-dir', tmp_path / 'work']
    said = refused('train', TINY, *common)
    assert 'train_dataloader' in said and str(tmp_path / 'train') in said

    write_class_folder(tmp_path, CIFAR10[:9], dict(train=1, test=1), size=32)
    said = refused('train', TINY, *common)
    assert 'train_dataloader' in said and '(9)' in said and '(10)' in said
    said = refused('test', TINY, trained / 'epoch_1.pth', *common)
    assert 'test_dataloader' in said and '(9)' in said

    (tmp_path / 'train' / CIFAR10[9]).mkdir()
    assert 'val_dataloader' in refused('train', TINY, *common)


def test_several_data_roots_need_several_options(refused, tmp_path):
    said = refused('train', TINY, '--data-root', tmp_path, '--cfg-options',
                   'val_dataloader.dataset.data_root=elsewhere')  # fmt: skip
    assert "val_dataloader.dataset.data_root is 'elsewhere'" in said

    config = tmp_path / 'two.py'
    config.write_text(
        f'_base_ = {str(TINY)!r}\n'
        "val_dataloader = dict(dataset=dict(data_root='elsewhere'))"
    )
    said = refused('train', config, '--data-root', tmp_path)
    assert 'ambiguous' in said and 'data/cifar10, elsewhere' in said


def test_unreadable_configs_are_refused(refused, tmp_path):
    config = tmp_path / 'broken.py'
    for text, words in [
        ('model = dict(', 'cannot be read'),
        ("_base_ = './absent.py'", 'absent.py'),
        ("custom_imports = dict(imports=['no_such_module'])", 'no_such_module'),
    ]:
        config.write_text(text)
        assert words in refused('train', config)
    said = refused('train', TINY, '--cfg-options', 'model.neck.7.type=x')
    assert '--cfg-options does not fit' in said


@pytest.mark.parametrize(
    ('wrapper', 'gpu', 'expected'),
    [
        (None, True, 'AmpEquilibriumOptimWrapper'),
        ('OptimWrapper', True, 'AmpOptimWrapper'),
        ('AmpOptimWrapper', True, 'AmpOptimWrapper'),
        # mmengine's own refuses a CPU.
        (None, False, 'AmpEquilibriumOptimWrapper'),
        ('OptimWrapper', False, 'AmpEquilibriumOptimWrapper'),
        ('AmpOptimWrapper', False, 'AmpEquilibriumOptimWrapper'),
    ],
)
def test_amp_takes_the_counterpart_of_the_wrapper(
    call, monkeypatch, wrapper, gpu, expected
):
    cfg = Config.fromfile(TINY)
    if wrapper is not None:
        cfg.optim_wrapper.type = wrapper
    monkeypatch.syspath_prepend(ROOT / 'tools')
    train = import_module('train')
    monkeypatch.setattr(train, 'has_accelerator', lambda: gpu)
    train.enable_amp(cfg)
    assert cfg.optim_wrapper.type == expected


def test_an_optimizer_wrapper_without_amp_is_refused(call, monkeypatch):
    cfg = Config.fromfile(TINY)
    cfg.optim_wrapper.type = 'OptimWrapperDict'
    train = import_module('train')
    monkeypatch.setattr(train, 'has_accelerator', lambda: True)
    with pytest.raises(SystemExit, match='OptimWrapperDict'):
        train.enable_amp(cfg)


def test_auto_scale_lr_needs_a_base(refused, tmp_path):
    config = tmp_path / 'no_base.py'
    config.write_text(f'_base_ = {str(TINY)!r}\nauto_scale_lr = dict(_delete_=True)')
    assert 'base_batch_size' in refused('train', config, '--auto-scale-lr')


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_launchers_without_their_environment_are_refused(
    refused, monkeypatch, launcher
):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cpu')
    said = refused('train', TINY, '--launcher', launcher)
    assert 'dist_train.sh' in said


def test_out_files_that_cannot_be_written_are_refused(refused, trained, tmp_path):
    common = [TINY, trained / 'epoch_1.pth', '--work-dir', tmp_path]
    assert '.pkl' in refused('test', *common, '--out', 'predictions.txt')
    assert '.pkl' in refused('test', *common, '--out', 'folder')
    assert '.json' in refused(
        'test', *common, '--out', 'metrics.csv', '--out-item', 'metrics'
    )
    assert '--out FILE' in refused('test', *common, '--out-item', 'metrics')


def test_nothing_to_evaluate_is_refused(refused, trained):
    said = refused('test', TINY, trained / 'epoch_1.pth', '--cfg-options',
                   'test_dataloader=None')  # fmt: skip
    assert 'no test_dataloader' in said


def test_drawing_needs_a_hook(refused, trained, cifar10_folder):
    checkpoint = trained / 'epoch_1.pth'
    for options, words in [
        (['--show-dir', 'x', '--interval', '0'], '--interval is 0'),
        (['--show-dir', 'x', '--cfg-options', 'default_hooks.visualization=None'],
         'VisualizationHook'),
    ]:  # fmt: skip
        assert words in refused('test', TINY, checkpoint, *options)


def test_types_that_are_classes(monkeypatch):
    """In a config in Python: each toolbox's own way of drawing, and of refusing."""
    from mmseg.engine.hooks import SegVisualizationHook

    from mdeq_mm.multi_task import MultiTaskDataset

    monkeypatch.syspath_prepend(ROOT / 'tools')
    monkeypatch.delitem(sys.modules, 'test', raising=False)
    tool = import_module('test')
    hook = ConfigDict(type=SegVisualizationHook)
    cfg = Config(dict(visualizer=dict(type='SegLocalVisualizer')))
    cfg.default_hooks = ConfigDict(visualization=hook)
    tool.set_visualization(
        cfg, SimpleNamespace(interval=1, show=False, wait_time=0, show_dir='shown')
    )
    assert cfg.default_hooks.visualization.draw
    assert cfg.visualizer.save_dir == 'shown'
    assert 'enable' not in cfg.default_hooks.visualization
    cfg.test_dataloader = ConfigDict(dataset=dict(type=MultiTaskDataset))
    with pytest.raises(SystemExit):
        tool.set_tta(cfg)


def test_unfit_checkpoints_are_refused(refused, trained, cifar10_folder, tmp_path):
    """mmengine itself would log it, and evaluate random weights."""
    common = ['--data-root', cifar10_folder, '--work-dir', tmp_path]
    said = refused('test', RESNET, trained / 'epoch_1.pth', *common)
    assert 'epoch_1.pth' in said and 'another architecture' in said
    said = refused('train', RESNET, '--resume', trained / 'epoch_1.pth', *common)
    assert 'another architecture' in said

    damaged = tmp_path / 'damaged.pth'
    damaged.write_bytes((trained / 'epoch_1.pth').read_bytes()[:1000])
    assert 'cannot be read' in refused('test', TINY, damaged, *common)

    content = torch.load(trained / 'epoch_1.pth', weights_only=False)
    content['state_dict']['head.fc.weight'][0, 0] = torch.inf
    torch.save(content, tmp_path / 'infinite.pth')
    options = ['--cfg-options', f'load_from={tmp_path / "infinite.pth"}']
    assert 'non-finite' in refused('test', TINY, tmp_path / 'infinite.pth', *common)
    assert 'non-finite' in refused('train', TINY, *common, *options)

    hostile = tmp_path / 'hostile.pth'
    hostile.write_bytes(pickle.dumps(dict(state_dict=Code())))
    assert 'cannot be read' in refused('test', TINY, hostile, *common)
    assert not Path('ran').exists()


@pytest.mark.parametrize(
    ('option', 'words'),
    [
        ('arch=huge', "arch='huge' is unknown"),
        ('solver.tol=-1', 'solver.tol=-1'),
        ('gradient.steps=0', 'gradient.steps=0'),
        ('gradient.type=Exact', "gradient.type='Exact'"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    refused, cifar10_folder, tmp_path, option, words
):
    common = ['--data-root', cifar10_folder, '--work-dir', tmp_path]
    options = ['--cfg-options', f'model.backbone.{option}']
    assert words in refused('train', TINY, *common, *options)


class Code:
    """Pickles to a call, as a hostile file would."""

    def __reduce__(self):
        return Path.touch, (Path('ran'),)


def test_tta_tells_of_the_equilibria_of_all_versions(call, trained, cifar10_folder,
                                                     tmp_path):  # fmt: skip
    """Two versions of each image: as many evaluations as both take."""
    found = []
    for tta in ([], ['--tta']):
        out = tmp_path / f'{len(found)}.pkl'
        call('test', TINY, trained / 'epoch_1.pth', '--data-root', cifar10_folder,
             '--work-dir', tmp_path / 'work', '--out', out, *tta, '--cfg-options',
             f'visualizer.name={out}')  # fmt: skip
        found.append(mmengine.load(out))
    for plain, both in zip(*found, strict=True):
        assert both['equilibrium_steps'] > plain['equilibrium_steps']
        # One of the two versions is the image as it is.
        assert both['equilibrium_residual'] >= plain['equilibrium_residual'] * 0.999
