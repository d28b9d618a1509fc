import subprocess
import sys
import textwrap

import pytest
import torch

from mdeq_mm.registry import HOOKS
from tests.helpers import ROOT

from .conftest import watched


@pytest.fixture
def checkpoint(make_runner, tmp_path):
    """The checkpoint of a real training, with the history of its loss."""
    runner = make_runner()
    runner.train()
    path = tmp_path / 'epoch_3.pth'
    content = torch.load(path, weights_only=False)
    history = content['message_hub']['log_scalars']['train/loss']
    assert type(history).__name__ == 'HistoryBuffer'
    assert len(watched(runner).train) == 6
    return path


def run(code, *arguments):
    """A process of its own, because the list of allowed types is the process's."""
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )


def test_runner_checkpoints_load_after_it(checkpoint):
    code = """
        import sys, torch
        import mdeq_mm
        from mdeq_mm.registry import HOOKS
        try:
            torch.load(sys.argv[1], weights_only=True)
        except Exception as error:
            print('before:', type(error).__name__)
        HOOKS.build(dict(type='CheckpointGuardHook')).before_run(None)
        content = torch.load(sys.argv[1], weights_only=True)
        hub = content['message_hub']
        history = hub['log_scalars']['train/loss'].data[0]
        print('after:', content['meta']['iter'], len(history))
    """
    result = run(code, checkpoint)
    assert result.returncode == 0, result.stderr
    assert 'before: UnpicklingError' in result.stdout
    assert 'after: 6 6' in result.stdout


def test_a_runner_resumes_with_it(checkpoint):
    """In a Runner, where torch must not fall back to running code."""
    code = """
        import os, sys
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
        from tests.test_engine.test_hooks.conftest import runner_in, watched
        runner = runner_in(
            sys.argv[1],
            [dict(type='CheckpointGuardHook')],
            dict(by_epoch=True, max_epochs=4),
            resume=True,
        )
        runner.train()
        print('trained', [i for i, _ in watched(runner).train])
    """
    result = run(code, checkpoint.parent)
    assert result.returncode == 0, result.stderr
    assert 'trained [6, 7]' in result.stdout


def test_it_runs_before_other_hooks(make_runner):
    runner = make_runner([dict(type='CheckpointGuardHook')])
    names = [type(h).__name__ for h in runner.hooks]
    assert names.index('CheckpointGuardHook') < names.index('RuntimeInfoHook') + 2
    assert HOOKS.get('CheckpointGuardHook').priority == 'VERY_HIGH'


def test_non_finite_weights_are_refused(checkpoint, make_runner):
    content = torch.load(checkpoint, weights_only=False)
    content['state_dict']['head.weight'][0, 0] = torch.nan
    torch.save(content, checkpoint)
    guard = dict(type='CheckpointGuardHook')
    runner = make_runner([guard], load_from=str(checkpoint))
    with pytest.raises(ValueError, match=r'head\.weight holds non-finite numbers'):
        runner.train()
