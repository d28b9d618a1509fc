"""Segmentation with several processes on a CPU, where there is no SyncBN."""

import cv2
import mmengine
import numpy as np
import pytest
import torch

pytest.importorskip('mmseg', reason='mmseg is not installed')

from tests.test_tools.test_shell import free_port, run
from tests.test_tools.test_train_test import (
    call,  # noqa: F401
    write_mmseg_config,
)

FALLBACK = 'batch norms use the statistics of each process by itself'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Of a segmentor with SyncBN in stem and head; two images to train on, three
    to evaluate.
    """
    folder = tmp_path_factory.mktemp('segmentation')
    base = write_mmseg_config(folder / 'data')
    rng = np.random.default_rng(1)
    for kind, shape in (('images', (33, 40, 3)), ('annotations', (33, 40))):
        suffix, top = ('jpg', 255) if kind == 'images' else ('png', 2)
        path = folder / f'data/{kind}/test/2.{suffix}'
        assert cv2.imwrite(str(path), rng.integers(0, top, shape, np.uint8))
    path = folder / 'sync_bn.py'
    path.write_text(
        f'_base_ = {str(base)!r}\n'
        "sync = dict(type='SyncBN', requires_grad=True)\n"
        'model = dict(backbone=dict(norm_cfg=sync), decode_head=dict(norm_cfg=sync))\n'
        'train_dataloader = dict(batch_size=1)\n'
        "default_hooks = dict(data=dict(type='DataGuardHook'),\n"
        '                     logger=dict(interval=1),\n'
        '                     checkpoint=dict(interval=2))\n'
    )
    return path


@pytest.fixture(scope='module')
def trained(config):
    """Two processes train two iterations and validate; work dir and log."""
    work_dir = config.parent / 'two'
    result = run('dist_train.sh', config, 2, '--work-dir', work_dir, **shell(config))
    assert result.returncode == 0, result.stderr[-3000:]
    return work_dir, result.stdout + result.stderr


def shell(config):
    """Where to start a script, and its environment."""
    # mmengine leaves a folder in the current one, so this is not the repository.
    return dict(
        cwd=config.parent,
        PORT=str(free_port()),
        CUDA_VISIBLE_DEVICES='-1',
        OMP_NUM_THREADS='1',
    )


@pytest.mark.timeout(200)
def test_two_processes_train_without_sync_bn(trained):
    work_dir, log = trained
    assert (work_dir / 'iter_2.pth').is_file()
    assert 'Iter(train) [2/2]' in log and 'mIoU' in log
    # One process says it for both, and shares of the files add up.
    assert log.count(FALLBACK) == log.count('talk over gloo') == 1
    assert log.count('Checked 5 label maps') == 1
    state = torch.load(work_dir / 'iter_2.pth', weights_only=False)['state_dict']
    assert int(state['backbone.stem.0.bn.num_batches_tracked']) == 2


@pytest.mark.timeout(200)
def test_two_processes_test_as_one(trained, config, call, tmp_path):  # noqa: F811
    """Three images: the one that is padded with is not counted."""
    work_dir, _ = trained

    def line(name):
        return ['--work-dir', tmp_path / name, '--out', tmp_path / f'{name}.json',
                '--out-item', 'metrics']  # fmt: skip

    result = run('dist_test.sh', config, work_dir / 'iter_2.pth', 2, *line('two'),
                 **shell(config))  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    call('test', config, work_dir / 'iter_2.pth', *line('one'))
    two, one = (mmengine.load(tmp_path / f'{name}.json') for name in ('two', 'one'))
    assert two == one
    assert 0 < one['mIoU'] < 100


def test_one_process_trains_without_sync_bn(call, config, capfd, tmp_path):  # noqa: F811
    """mmengine itself replaces it there."""
    call('train', config, '--work-dir', tmp_path)
    assert (tmp_path / 'iter_2.pth').is_file()
    assert FALLBACK not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_bad_input_ends_all_processes(config, tmp_path):
    """With one sentence each, though only one of them has read the file."""
    bad = tmp_path / 'bad'
    bad.mkdir()
    for i in range(2):
        cv2.imwrite(str(bad / f'{i}.png'), np.full((33, 40), 7 * i, np.uint8))
    prefix = f'train_dataloader.dataset.data_prefix.seg_map_path={bad}'
    result = run('dist_train.sh', config, 2, '--work-dir', tmp_path / 'work',
                 '--cfg-options', prefix, **shell(config))  # fmt: skip
    assert result.returncode != 0
    said = [x for x in result.stderr.splitlines() if x.startswith('train.py: error')]
    assert len(said) == 2
    assert all(f'{bad}/1.png holds the label 7' in sentence for sentence in said)
    assert not list((tmp_path / 'work').rglob('*.pth'))
