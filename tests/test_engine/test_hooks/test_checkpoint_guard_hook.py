import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict

from mdeq_mm.checkpoints import read_checkpoint
from mdeq_mm.checkpoints.checkpoint_guard_hook import guard_checkpoints
from mdeq_mm.registry import HOOKS
from tests.helpers import ROOT, logged

from .conftest import Classifier, Images, watched

GUARD = dict(type='CheckpointGuardHook')


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
        from tests.test_engine.test_hooks.conftest import runner_in, watched
        runner = runner_in(
            sys.argv[1],
            [dict(type='CheckpointGuardHook')],
            dict(by_epoch=True, max_epochs=4),
            resume=True,
        )
        runner.train()
        print('trained', [i for i, _ in watched(runner).train])
        assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
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


SCHEDULES = dict(
    OneCycleLR=dict(eta_max=0.1, total_steps=10),
    CosineAnnealingLR=dict(T_max=5),
    CosineRestartLR=dict(periods=[2, 5], restart_weights=[1, 0.5], eta_min=0.001),
    LinearLR=dict(start_factor=0.1, end=5),
    MultiStepLR=dict(milestones=[1, 4], gamma=0.1),
    PolyLR=dict(power=0.9, eta_min=1e-4),
)


@pytest.mark.parametrize('kind', SCHEDULES)
def test_every_schedule_is_resumed(make_runner, tmp_path, kind):
    """And follows the course of a training without a break."""
    schedule = dict(type=kind, by_epoch=False, **SCHEDULES[kind])
    make = partial(make_runner, [GUARD], param_scheduler=schedule)
    whole = make()
    with logged() as texts:
        whole.train()
    assert not [text for text in texts if 'cannot be read' in text]
    path = str(tmp_path / 'epoch_1.pth')
    resumed = make(load_from=path, resume=True)
    resumed.train()
    assert [i for i, _ in watched(resumed).train] == [2, 3, 4, 5]
    (rate,) = resumed.optim_wrapper.get_lr()['lr']
    assert [rate] == pytest.approx(whole.optim_wrapper.get_lr()['lr'])
    assert rate != read_checkpoint(path)['optimizer']['param_groups'][0]['lr']


def test_methods_of_a_schedule_are_not_saved(make_runner, tmp_path):
    schedule = dict(type='OneCycleLR', by_epoch=False, **SCHEDULES['OneCycleLR'])
    runner = make_runner([GUARD], param_scheduler=schedule)
    runner.train()
    (saved,) = read_checkpoint(str(tmp_path / 'epoch_1.pth'))['param_schedulers']
    assert 'anneal_func' not in saved and saved['total_steps'] == 10
    # Those in use keep them.
    assert runner.param_schedulers[0].anneal_func(0.0, 1.0, 0.5) == 0.5


def test_what_a_runner_writes_is_read_back(make_runner, tmp_path, monkeypatch):
    """Averages, best results, and what data sets and hooks add to it."""
    hooks = [GUARD, dict(type='EMAHook'), dict(type='EarlyStoppingHook',
             monitor='count', rule='less', patience=9)]  # fmt: skip
    saving = dict(type='CheckpointHook', interval=1, save_best='count', rule='less')
    described = dict(
        classes=('a', 'b'),
        palette=np.zeros((2, 3), np.uint8),
        label_map=ConfigDict(a=1),
        empty=np.array([]),
    )
    monkeypatch.setattr(Images, 'metainfo', described, raising=False)
    schedule = dict(type='ReduceOnPlateauLR', monitor='count', rule='less')
    runner = make_runner(
        hooks, default_hooks=dict(checkpoint=saving), param_scheduler=schedule
    )
    for kind in '?bhilqBHILQefd':
        value = np.dtype(kind).type(1)
        runner.message_hub.update_info(f'number {kind}', value)
    runner.message_hub.update_info('best', dict(score=np.float64(0.5), at=(1, 'x')))
    with logged() as texts:
        runner.train()
    assert not [text for text in texts if 'cannot be read' in text]
    saved = list(tmp_path.glob('*.pth'))
    assert len(saved) >= 3
    for path in saved:
        content = read_checkpoint(str(path))
        info = content['message_hub']['runtime_info']
        assert info['best'] == dict(score=0.5, at=(1, 'x'))
        assert info['number B'].dtype == np.uint8
        assert content['meta']['dataset_meta']['palette'].shape == (2, 3)
        assert content['meta']['dataset_meta']['label_map'] == dict(a=1)
    assert 'ema_state_dict' in read_checkpoint(str(tmp_path / 'epoch_3.pth'))
    again = make_runner(hooks, dict(by_epoch=True, max_epochs=4), resume=True)
    again.train()
    assert [i for i, _ in watched(again).train] == [6, 7]


def test_what_cannot_be_read_back_is_told_once(make_runner):
    runner = make_runner([GUARD])
    runner.message_hub.update_info('folder', Path('a'))
    with logged() as texts:
        runner.train()
    (said,) = [text for text in texts if 'cannot be read back' in text]
    assert 'message_hub.runtime_info.folder (' in said and 'in their place' in said


def test_a_config_in_a_checkpoint_is_not_run(make_runner, checkpoint, tmp_path):
    """mmengine would run it as a program when it resumes."""
    mark = tmp_path / 'ran'
    content = read_checkpoint(str(checkpoint))
    program = f'open({str(mark)!r}, "w").close()'
    content['meta']['config'] = program
    torch.save(content, checkpoint)
    runner = make_runner([GUARD], dict(by_epoch=True, max_epochs=4), resume=True)
    runner.train()
    assert [i for i, _ in watched(runner).train] == [6, 7]
    assert not mark.exists()


@pytest.mark.parametrize('wrap', [dict, lambda state: dict(model=state)])
def test_weights_are_found_where_mmengine_does_not_look(make_runner, tmp_path, wrap):
    state = {k: v + 1 for k, v in Classifier().state_dict().items()}
    torch.save(wrap(state), tmp_path / 'weights.pth')
    runner = make_runner([GUARD], load_from=str(tmp_path / 'weights.pth'))
    runner.call_hook('before_run')
    runner.load_or_resume()
    found = runner.model.state_dict()
    assert torch.equal(found['head.weight'], state['head.weight'])


def test_what_holds_no_weights_is_refused(make_runner, tmp_path):
    torch.save([torch.ones(1)], tmp_path / 'list.pth')
    runner = make_runner([GUARD], load_from=str(tmp_path / 'list.pth'))
    with pytest.raises(ValueError, match=r'list\.pth holds a list, not a dict'):
        runner.train()
    with pytest.raises(ValueError, match='is a list, not a dict'):
        runner.call_hook('after_load_checkpoint', checkpoint=[torch.ones(1)])


def test_a_runner_gets_it_once(make_runner):
    for hooks in ([], [GUARD]):
        runner = make_runner(hooks)
        for _ in range(2):
            guard_checkpoints(runner)
            names = [type(hook).__name__ for hook in runner.hooks]
            assert names.count('CheckpointGuardHook') == 1
