import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mdeq_mm.utils.checkpoint import (
    allowed_types,
    check_no_more,
    check_state_dict,
    load_pretrained,
    read_checkpoint,
    state_dict_of,
)
from tests.helpers import ROOT


def runner_checkpoint():
    """What mmengine's Runner writes, message hub included."""
    history = HistoryBuffer()
    for value in (1.0, 2.5, 0.5):
        history.update(value)
    scalar = HistoryBuffer([np.float32(3)], [np.int64(1)])
    return dict(
        meta=dict(epoch=1, iter=7, seed=3, version='0.1', classes=('a', 'b')),
        state_dict=dict(weight=torch.randn(2, 3)),
        message_hub=dict(
            log_scalars={'train/loss': history, 'train/lr': scalar},
            runtime_info=dict(iter=7, done=np.bool_(True), x=np.float64(0.5)),
            resumed_keys={'train/loss': True},
        ),
        optimizer=dict(state={0: dict(step=torch.tensor(7.0))}, param_groups=[]),
    )


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / 'file.pth')


class TestReading:
    def test_a_runner_checkpoint(self, file):
        torch.save(runner_checkpoint(), file)
        found = read_checkpoint(file)
        history = found['message_hub']['log_scalars']['train/loss']
        assert isinstance(history, HistoryBuffer)
        assert history.data[0].tolist() == [1.0, 2.5, 0.5]
        assert history.mean() == pytest.approx(4 / 3)
        assert found['message_hub']['runtime_info']['x'] == 0.5

    @pytest.mark.parametrize('content', [torch.nn.Linear(2, 2), {1, 2}, object()])
    def test_other_objects_are_refused(self, file, content):
        torch.save(dict(model=content), file)
        if isinstance(content, set):
            assert read_checkpoint(file) == dict(model=content)
        else:
            with pytest.raises(ValueError, match=r'file\.pth cannot be read'):
                read_checkpoint(file)

    def test_settings_of_the_process_are_left_alone(self, file, monkeypatch):
        torch.save(runner_checkpoint(), file)
        for before in (None, '0', '1'):
            monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
            if before is not None:
                monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', before)
            allowed = torch.serialization.get_safe_globals()
            read_checkpoint(file)
            with pytest.raises(FileNotFoundError):
                read_checkpoint(file + '.not')
            assert torch.serialization.get_safe_globals() == allowed
            assert os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD') == before

    def test_tensors_come_to_the_cpu(self, file):
        torch.save(dict(a=torch.ones(2)), file)
        assert read_checkpoint(file)['a'].device.type == 'cpu'

    @pytest.mark.parametrize(
        'code',
        [
            # Functions by name, methods of allowed types, and attributes of them.
            b"cos\nsystem\n(S'touch {mark}'\ntR.",
            b'cbuiltins\nexec\n(S\'open("{mark}", "w")\'\ntR.',
            b'cbuiltins\neval\n(S\'open("{mark}", "w")\'\ntR.',
            b"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR.",
            b'cbuiltins\ngetattr\n(cmmengine.logging.history_buffer\nHistoryBuffer\n'
            b"S'__init__'\ntR.",
            b'cbuiltins\ngetattr\n(cmmengine.logging.history_buffer\nHistoryBuffer\n'
            b"S'_set_default_statistics'\ntR.",
            b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
            b'cmmengine.logging.history_buffer\nHistoryBuffer.register_statistics\n.',
        ],
    )
    def test_code_is_not_run(self, tmp_path, code):
        mark = tmp_path / 'ran'
        path = tmp_path / 'evil.pth'
        path.write_bytes(b'\x80\x02' + code.replace(b'{mark}', str(mark).encode()))
        with pytest.raises(ValueError, match=r'evil\.pth'):
            read_checkpoint(str(path))
        assert not mark.exists()

    def test_the_control_would_run_it(self, tmp_path):
        """Without the protection, the same file does run."""
        mark = tmp_path / 'ran'
        code = b'cbuiltins\nexec\n(S\'open("%s", "w")\'\ntR.' % str(mark).encode()
        pickle.loads(b'\x80\x02' + code)
        assert mark.exists()

    def test_only_statistics_are_fetched_from_a_history(self):
        fetch = next(
            t[0] for t in allowed_types() if isinstance(t, tuple) and 'getattr' in t[1]
        )
        assert fetch(HistoryBuffer, 'mean') is HistoryBuffer.mean
        for owner, name in (
            (HistoryBuffer, '__init__'),
            (os, 'system'),
            (dict, 'mean'),
        ):
            with pytest.raises(ValueError, match='do not load it'):
                fetch(owner, name)


def in_a_process(code, *arguments):
    """Run code in a process of its own: the allow-list is the process's."""
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_allow_list_for_the_process(file):
    torch.save(runner_checkpoint(), file)
    code = """
        import sys, torch
        from mdeq_mm.utils.checkpoint import allow_runner_checkpoints, read_checkpoint
        file = sys.argv[1]
        try:
            torch.load(file, weights_only=True)
        except Exception as error:
            print('refused', type(error).__name__)
        allow_runner_checkpoints()
        read_checkpoint(file)
        found = torch.load(file, weights_only=True)
        print(found['message_hub']['log_scalars']['train/loss'].mean())
    """
    result = in_a_process(code, file)
    assert result.returncode == 0, result.stderr
    assert 'refused UnpicklingError' in result.stdout
    # Reading a file in between takes nothing off the list.
    assert result.stdout.split()[-1] == '1.3333333333333333'


class TestStateDict:
    def test_wrappers(self):
        state = dict(a=torch.ones(1))
        assert state_dict_of(state) == state
        assert state_dict_of(dict(state_dict=state, meta={})) == state
        assert state_dict_of(dict(model=state)) == state
        assert state_dict_of(dict(state_dict={'module.a': state['a']})) == state

    def test_a_module_of_that_name_is_kept(self):
        state = {'module.a': torch.ones(1), 'other': torch.ones(1)}
        assert state_dict_of(state) == state

    def test_a_weight_called_model(self):
        state = dict(model=torch.ones(1))
        assert state_dict_of(state) == state

    def test_keys_that_are_no_names(self):
        with pytest.raises(ValueError, match=r'entry 3, .*state_dict\(\)'):
            state_dict_of({3: torch.ones(1)})

    def test_the_checkpoint_is_left_alone(self):
        checkpoint = {'module.a': torch.ones(1)}
        state_dict_of(checkpoint)['b'] = 1
        assert list(checkpoint) == ['module.a']


class TestChecks:
    @pytest.fixture
    def module(self):
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))

    def test_all_is_well(self, module):
        state = {f'x.{k}': v for k, v in module.state_dict().items()}
        check_state_dict(module, state | {'y': 1}, 'x.')
        check_no_more(module, state | {'y': 1}, 'x.')
        del state['x.1.num_batches_tracked']
        check_state_dict(module, state, 'x.')

    def test_missing(self, module):
        with pytest.raises(RuntimeError, match=r"lacks 8 of the 9 .*'x\.0\.weight'"):
            check_state_dict(torch.nn.Sequential(*module, module[0]), {}, 'x.')

    def test_shape(self, module):
        state = module.state_dict() | {'0.bias': torch.ones(4)}
        with pytest.raises(RuntimeError, match=r'0.bias has shape \(4,\) .*\(3,\)'):
            check_state_dict(module, state, '')

    @pytest.mark.parametrize('value', [torch.nan, -torch.inf])
    def test_not_finite(self, module, value):
        state = module.state_dict() | {'1.running_var': torch.full((3,), value)}
        with pytest.raises(ValueError, match=r'1.running_var holds non-finite'):
            check_state_dict(module, state, '')

    def test_more(self, module):
        state = module.state_dict() | {'1.gamma': torch.ones(1), '2.weight': 3}
        with pytest.raises(RuntimeError, match=r"has 1 entries .*'1\.gamma'"):
            check_no_more(module, state, '')


def test_load_pretrained_reports_the_file(file):
    module = torch.nn.Linear(2, 2)
    torch.save(dict(state_dict={5: 1}), file)
    with pytest.raises(ValueError, match=r'file\.pth: .*entry 5'):
        load_pretrained(module, file)
