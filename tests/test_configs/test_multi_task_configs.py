"""Configs of joint training: what they say, and that they train and are tested."""

import json
import sys
from importlib import import_module
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

import mmengine
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from yapf.yapflib import yapf_api

from mdeq_mm.checkpoints import read_checkpoint
from mdeq_mm.registry import METRICS, MODELS
from tests.cityscapes_folder import write_cityscapes
from tests.image_folders import write_class_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
SMALL = CONFIGS / 'multi_task/mdeq-small_fcn_4xb3-124k_in1k-cityscapes-512x1024.py'
DEMO = CONFIGS / 'demo/mdeq-joint_1xb16-12e_digits.py'
# The configs of one task each that a joint one stands beside.
SINGLES = {
    SMALL: (
        'imagenet/mdeq-small_4xb32-100e_in1k.py',
        'cityscapes/fcn_mdeq-small_4xb3-124k_cityscapes-512x1024.py',
    ),
    DEMO: (
        'demo/mdeq_1xb64-30e_digits.py',
        'demo/mdeq_1xb16-12e_digit-scenes-64x64.py',
    ),
}
STAGES = ('train', 'val', 'test')


def read(path):
    return Config.fromfile(CONFIGS / path).to_dict()


def build(path):
    cfg = Config.fromfile(CONFIGS / path)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:
        # Where mmpretrain's configs have it.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with torch.device('meta'):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


# Values


def test_there_is_nothing_else():
    joint = {*CONFIGS.glob('multi_task/*.py'), *CONFIGS.glob('demo/*joint*.py')}
    assert joint == set(SINGLES)


@pytest.mark.parametrize('path', SINGLES, ids=lambda p: p.stem)
def test_parts_are_those_of_the_single_tasks(path):
    joint, (cls, seg) = read(path), map(read, SINGLES[path])
    assert joint['default_scope'] == 'mmseg'
    model = joint['model']
    neck, head = cls['model']['neck'], cls['model']['head']
    if path == DEMO:
        # The demos of one task each differ in the width of their backbones.
        channels = tuple(model['decode_head']['in_channels'])
        neck |= dict(in_channels=channels)
        head |= dict(in_channels=sum(channels))
    assert model['neck'] == neck and model['head'] == head
    for part in ('backbone', 'decode_head', 'train_cfg', 'test_cfg'):
        assert model[part] == seg['model'][part]
    weight = 1.0 if path == SMALL else 0.2
    assert model['loss_weights'] == dict(cls=weight, seg=1.0)
    preprocessor = model['data_preprocessor']
    assert preprocessor['type'] == 'MultiTaskDataPreprocessor'
    expected = cls['data_preprocessor'] | dict(type='ClsDataPreprocessor')
    assert preprocessor['cls'] == expected
    assert preprocessor['seg'] == seg['model']['data_preprocessor']

    for stage in STAGES:
        loader = joint[f'{stage}_dataloader']
        dataset = loader['dataset']
        assert dataset['datasets'] == {
            task: single[f'{stage}_dataloader']['dataset']
            for task, single in (('cls', cls), ('seg', seg))
        }
        assert dataset.get('pair', True) == (stage == 'train')
        sampling = ('batch_size', 'sampler', 'persistent_workers')
        single = seg[f'{stage}_dataloader']
        assert [loader[k] for k in sampling] == [single[k] for k in sampling]
        if stage != 'train':
            found, metric = joint[f'{stage}_evaluator']
            assert metric == dict(type='EquilibriumMetric')
            assert found == dict(
                type='MultiTaskMetric',
                cls=cls[f'{stage}_evaluator'][0],
                seg=seg[f'{stage}_evaluator'][0],
            )
    for part in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'auto_scale_lr'):
        assert joint[part] == seg[part]
    hooks = joint['default_hooks']
    assert 'warmup' not in hooks
    assert hooks['monitor'] == seg['default_hooks']['monitor']
    assert {'guard', 'data'} < set(hooks)


def test_one_backbone_is_counted_once():
    joint, cls, seg = build(SMALL), *map(build, SINGLES[SMALL])
    numbers = [sum(p.numel() for p in m.parameters()) for m in (joint, cls, seg)]
    backbone = sum(p.numel() for p in joint.backbone.parameters())
    assert numbers[0] == numbers[1] + numbers[2] - backbone == 17_068_763
    assert set(joint.state_dict()) == set(cls.state_dict()) | set(seg.state_dict())


def test_both_tasks_have_about_as_many_pixels():
    cfg = read(SMALL)
    counts = cfg['train_dataloader']['dataset']['counts']
    height, width = cfg['model']['data_preprocessor']['seg']['size']
    ratio = counts['cls'] * 224**2 / (counts['seg'] * height * width)
    assert counts == dict(cls=8, seg=1)
    assert 2 / 3 < ratio < 3 / 2
    assert cfg['default_hooks']['checkpoint']['save_best'] == 'seg/mIoU'


@pytest.mark.parametrize('path', SINGLES, ids=lambda p: p.stem)
def test_hooks_and_metrics_are_built(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    metric, equilibrium = map(METRICS.build, cfg.val_evaluator)
    assert type(equilibrium).__name__ == 'EquilibriumMetric'
    names = {k: [type(m).__name__ for m in v] for k, v in metric.metrics.items()}
    assert names == dict(cls=['Accuracy'], seg=['IoUMetric'])


# Training


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Call the main function of train.py or test.py with a command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    # Set by the tools themselves; taken back after the test.
    monkeypatch.setenv('LOCAL_RANK', '0')
    # mmengine prints a config five times a run, and lays it out anew each time, which
    # takes longer than the run.
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **style: (text, True))
    numbers = count()

    def run(name, *args, options=()):
        # A visualizer lives as long as its process, known by its name.
        fresh = f'visualizer.name={tmp_path}/{next(numbers)}'
        line = [*args, '--cfg-options', *options, fresh]
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, line)])
        # Python's own standard library has a package called test.
        monkeypatch.delitem(sys.modules, name, raising=False)
        import_module(name).main()

    return run


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Folders of the demo: digits, and scenes of squares."""
    root = tmp_path_factory.mktemp('digits')
    names = [str(i) for i in range(10)]
    write_class_folder(root / 'cls', names, dict(train=10, test=10), size=8)
    rng = np.random.default_rng(0)
    for split, number in (('train', 2), ('test', 2)):
        for kind in ('images', 'annotations'):
            (root / 'seg' / kind / split).mkdir(parents=True)
        for i in range(number):
            labels = np.zeros((64, 64), np.uint8)
            labels[8:40, 4 + i : 30] = 1 + i
            image = labels * 90 + rng.integers(0, 60, (64, 64), np.uint8)
            for kind, picture in (('images', image), ('annotations', labels)):
                path = root / 'seg' / kind / split / f'{i}.png'
                assert cv2.imwrite(str(path), picture)
    return root


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp('cityscapes'), dict(train=3, val=2))


def data_roots(cls, seg):
    """Options that name a folder for each task; docs/joint_training.md shows them."""
    return [
        f'{stage}_dataloader.dataset.datasets.{task}.data_root={root}'
        for stage in STAGES
        for task, root in (('cls', cls), ('seg', seg))
    ]


def records(work_dir):
    """All records that the runs in a work dir have logged."""
    return [
        json.loads(line)
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]


def shown(folder):
    return sorted(path.name for path in folder.rglob('vis_image/*.png'))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_imagenet_and_cityscapes(call, imagenet_folder, cityscapes, tmp_path):
    """Trains, evaluates, keeps the best, resumes, is tested and draws."""
    # What a CPU needs: small images, and no workers.
    data = 'dataloader.dataset.datasets'
    options = [
        *data_roots(imagenet_folder, cityscapes),
        *(f'{stage}_dataloader.num_workers=0' for stage in STAGES),
        'model.backbone.init_cfg=None',
        'model.data_preprocessor.seg.size=(32,64)',
        'train_dataloader.batch_size=2',
        'train_dataloader.dataset.counts.cls=2',
        f'train_{data}.cls.pipeline.1.scale=64',
        f'train_{data}.seg.pipeline.2.scale=(128,64)',
        f'train_{data}.seg.pipeline.3.crop_size=(32,64)',
        *(f'{s}_{data}.cls.pipeline.1.scale=64' for s in STAGES[1:]),
        *(f'{s}_{data}.cls.pipeline.2.crop_size=64' for s in STAGES[1:]),
        *(f'{s}_{data}.seg.pipeline.1.scale=(128,64)' for s in STAGES[1:]),
        'train_cfg.val_interval=1',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.logger.interval=1',
        'default_hooks.monitor.interval=1',
    ]
    out = tmp_path / 'trained'
    call('train', SMALL, '--work-dir', out, options=[*options, 'train_cfg.max_iters=1'])
    trained, evaluated = records(out)
    losses = trained['cls.loss'] + trained['decode.loss_ce']
    assert trained['loss'] == pytest.approx(losses, abs=1e-5)
    assert trained['cls.loss'] == pytest.approx(np.log(1000), rel=0.2)
    assert trained['decode.loss_ce'] == pytest.approx(np.log(19), rel=0.2)
    limit = read(SMALL)['model']['backbone']['solver']['max_steps']
    assert 1 < trained['eq_steps'] <= limit == 5
    metrics = {'cls/accuracy/top1', 'cls/accuracy/top5', 'seg/mIoU', 'seg/aAcc'}
    assert metrics < set(evaluated)
    assert (out / 'best_seg_mIoU_iter_1.pth').is_file()

    # On from there.
    call('train', SMALL, '--work-dir', out, '--resume',
         options=[*options, 'train_cfg.max_iters=2'])  # fmt: skip
    *_, trained, evaluated = records(out)
    assert trained['iter'] == 2 and len(records(out)) == 4
    assert 1 < trained['eq_steps'] <= limit
    state = read_checkpoint(str(out / 'iter_2.pth'))['state_dict']
    assert {name.split('.')[0] for name in state} == {
        'backbone', 'neck', 'head', 'decode_head'
    }  # fmt: skip

    # Images with a class are drawn beside those with a label map.
    call('test', SMALL, out / 'iter_2.pth', '--work-dir', tmp_path / 'tested',
         '--show-dir', tmp_path / 'shown', '--out', tmp_path / 'metrics.json',
         '--out-item', 'metrics', options=options)  # fmt: skip
    found = mmengine.load(tmp_path / 'metrics.json')
    assert metrics < set(found)
    for name, value in found.items():
        assert value == pytest.approx(evaluated[name], abs=1e-6)
    names = shown(tmp_path / 'shown')
    assert len(names) == 5
    assert len([name for name in names if 'frankfurt' in name]) == 2


def test_digits(call, digits, tmp_path):
    """The same without the slow parts: a small model, and no pretrained file."""
    options = [
        *data_roots(digits / 'cls', digits / 'seg'),
        'train_dataloader.batch_size=1',
        'train_dataloader.dataset.counts.cls=10',
        'train_cfg.val_interval=4',
        'param_scheduler=None',
        'optim_wrapper.optimizer.lr=3e-3',
        'default_hooks.checkpoint.save_best=seg/mIoU',
        'default_hooks.visualization.draw=True',
        'default_hooks.visualization.interval=1',
        'default_hooks.logger.interval=1',
        'default_hooks.monitor.interval=1',
    ]
    out = tmp_path / 'trained'
    call('train', DEMO, '--work-dir', out,
         options=[*options, 'train_cfg.max_epochs=4'])  # fmt: skip
    *trained, evaluated = records(out)
    assert len(trained) == 8 and all(1 < r['eq_steps'] <= 12 for r in trained)
    # It is logged as it enters the sum.
    assert trained[0]['cls.loss'] == pytest.approx(0.2 * np.log(10), rel=0.1)
    assert trained[-1]['decode.loss_ce'] < 0.8 * trained[0]['decode.loss_ce']
    assert {'cls/accuracy/top1', 'seg/mIoU'} < set(evaluated)
    assert (out / 'best_seg_mIoU_epoch_4.pth').is_file()
    # A prediction, and how equilibria were approached.
    assert len(shown(out)) == 2

    call('train', DEMO, '--work-dir', out, '--resume',
         options=[*options, 'train_cfg.max_epochs=5'])  # fmt: skip
    numbers = [r['iter'] for r in records(out) if 'loss' in r]
    assert numbers == list(range(1, 11))

    # Images with a class are drawn beside those with a label map.
    checkpoint, stored = out / 'epoch_5.pth', tmp_path / 'predictions.pkl'
    call('test', DEMO, checkpoint, '--out', stored, '--work-dir', tmp_path / 'tested',
         '--show-dir', tmp_path / 'shown', options=options)  # fmt: skip
    assert len(shown(tmp_path / 'shown')) == 12
    predictions = mmengine.load(stored)
    assert [p['task'] for p in predictions] == ['cls'] * 10 + ['seg'] * 2
    # In the order of the data set, each once.
    assert [p['gt_label'].item() for p in predictions[:10]] == list(range(10))
    assert all('pred_sem_seg' in p for p in predictions[10:])

    (metrics,) = (tmp_path / 'tested').glob('*/*.json')
    right = [p['pred_label'].item() == i for i, p in enumerate(predictions[:10])]
    found = json.loads(metrics.read_text())
    assert found['cls/accuracy/top1'] == pytest.approx(10 * sum(right))
    assert 0 <= found['seg/mIoU'] <= 100

    # The segmentation alone starts from this checkpoint, and this model from its.
    still = [
        'optim_wrapper.optimizer.lr=0',
        'param_scheduler=None',
        'train_cfg.max_epochs=1',
        'default_hooks.checkpoint.save_optimizer=False',
    ]
    alone = CONFIGS / SINGLES[DEMO][1]
    call('train', alone, '--work-dir', tmp_path / 'alone', '--no-validate',
         '--data-root', digits / 'seg',
         options=[*still, f'load_from={checkpoint}',
                  'train_dataloader.batch_size=2'])  # fmt: skip
    call('train', DEMO, '--work-dir', tmp_path / 'again', '--no-validate',
         options=[*data_roots(digits / 'cls', digits / 'seg'), *still,
                  f'load_from={tmp_path / "alone" / "epoch_1.pth"}',
                  'train_dataloader.batch_size=2'])  # fmt: skip
    learned = dict(build(DEMO).named_parameters())

    def weights(path):
        state = read_checkpoint(str(path))['state_dict']
        return {name: state[name] for name in learned if name in state}

    joint = weights(checkpoint)
    single, again = (weights(tmp_path / n / 'epoch_1.pth') for n in ('alone', 'again'))
    shared = {k for k in joint if k.startswith(('backbone', 'decode_head'))}
    assert set(single) == shared < set(joint) == set(again) == set(learned)
    for name in shared:
        assert torch.equal(joint[name], single[name]), name
        assert torch.equal(joint[name], again[name]), name
    assert not torch.equal(joint['head.fc.weight'], again['head.fc.weight'])


def test_one_data_root_for_two_data_sets_is_refused(call, digits, tmp_path):
    with pytest.raises(SystemExit) as stop:
        call('train', DEMO, '--work-dir', tmp_path, '--data-root', digits)
    said = stop.value.code
    assert 'ambiguous' in said and '--cfg-options' in said
    assert 'data/digit_scenes' in said and 'data/digits' in said


@pytest.mark.parametrize('task', ['cls', 'seg'])
def test_an_absent_folder_is_named(call, digits, tmp_path, task):
    roots = dict(cls=digits / 'cls', seg=digits / 'seg') | {task: tmp_path / 'absent'}
    with pytest.raises(SystemExit) as stop:
        call('train', DEMO, '--work-dir', tmp_path, options=data_roots(**roots))
    assert f'{tmp_path / "absent"}' in stop.value.code
