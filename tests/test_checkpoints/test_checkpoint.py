import os
import subprocess
import sys
import textwrap
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mdeq_mm.checkpoints import (
    check_finite,
    check_no_more,
    check_resumable,
    check_state_dict,
    read_checkpoint,
    state_dict_of,
)
from mdeq_mm.checkpoints.fitting import load_pretrained
from mdeq_mm.checkpoints.reading import allowed_types, unreadable_entries
from tests.helpers import ROOT

HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'


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
            allowed = set(torch.serialization.get_safe_globals())
            read_checkpoint(file)
            with pytest.raises(FileNotFoundError):
                read_checkpoint(file + '.not')
            assert set(torch.serialization.get_safe_globals()) == allowed
            assert os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD') == before

    def test_tensors_come_to_the_cpu(self, file):
        torch.save(dict(a=torch.ones(2)), file)
        assert read_checkpoint(file)['a'].device.type == 'cpu'

    @pytest.mark.parametrize(
        'code',
        [
            # Functions by name, methods of allowed types, and attributes of them.
            b'cos\nsystem\nX\x01\0\0\0a\x85R.',
            b'cbuiltins\nexec\nX\x01\0\0\0a\x85R.',
            b'cbuiltins\neval\nX\x01\0\0\0a\x85R.',
            b'cbuiltins\ngetattr\ncos\npath\nX\x04\0\0\0join\x86R.',
            b'cbuiltins\ngetattr\n' + HISTORY + b'X\x08\0\0\0__init__\x86R.',
            b'cbuiltins\ngetattr\n' + HISTORY + b'X\x0a\0\0\0statistics\x86R.',
            b'cbuiltins\ngetattr\ncnumpy\nndarray\nX\x06\0\0\0tofile\x86R.',
            b'cmmengine.logging.history_buffer\nHistoryBuffer.register_statistics\n.',
        ],
    )
    def test_code_is_not_run(self, tmp_path, code):
        path = tmp_path / 'evil.pth'
        path.write_bytes(b'\x80\x02}X\x01\0\0\0x' + code[:-1] + b's.')
        with pytest.raises(ValueError, match=r'evil\.pth.*it asks for '):
            read_checkpoint(str(path))

    def test_the_control_is_read(self, tmp_path):
        """The same file, with a statistic in place of what is not allowed."""
        path = tmp_path / 'good.pth'
        code = b'cbuiltins\ngetattr\n' + HISTORY + b'X\x04\0\0\0mean\x86R'
        path.write_bytes(b'\x80\x02}X\x01\0\0\0x' + code + b's.')
        # Whatever this PyTorch thinks of a pickle without the rest of the format.
        with pytest.raises(ValueError, match='cannot be read') as found:
            read_checkpoint(str(path))
        assert 'asks for' not in str(found.value)

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
            with pytest.raises(ValueError, match='no checkpoint of a Runner does'):
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
        from mdeq_mm.checkpoints import allow_runner_checkpoints
        from mdeq_mm.checkpoints import read_checkpoint
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

    @pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
    def test_other_precisions_are_cast(self, module, dtype):
        state = {k: v + 1 for k, v in module.state_dict().items()}
        state |= {k: v.to(dtype) for k, v in state.items() if v.is_floating_point()}
        check_state_dict(module, state, '')
        module.load_state_dict(state)
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert torch.equal(module[0].weight, state['0.weight'].float())

    @pytest.mark.parametrize(
        ('value', 'words'),
        [
            (3, r'0\.bias is a int .* not a tensor'),
            ([0.0, 1.0, 2.0], r'0\.bias is a list'),
            (np.ones(3), r'0\.bias is a ndarray'),
            (torch.ones(3).int(), r'0\.bias is a int32 tensor'),
            (torch.ones(3).bool(), r'0\.bias is a bool tensor'),
            (torch.ones(3) * 1j, r'0\.bias is a complex64 tensor'),
            (torch.ones(3).to_sparse(), 'of layout sparse_coo'),
            (torch.ones(3, device='meta'), 'on meta'),
            # Finite, but not in the precision of the module.
            (torch.full((3,), 1e300, dtype=torch.float64), 'non-finite'),
        ],
        ids=str,
    )
    def test_what_is_no_weight(self, module, value, words):
        state = module.state_dict() | {'0.bias': value}
        with pytest.raises(ValueError, match=words):
            check_state_dict(module, state, '')

    def test_finite_whatever_the_tensor(self):
        check_finite({'a': 3, 'b': torch.ones(3).to_sparse(), 'c': torch.ones(2).int()})
        check_finite({'a': torch.ones(3, device='meta'), 'b': torch.ones(0)})
        small = torch.ones(3).to(torch.float8_e5m2)
        check_finite({'a': small})
        with pytest.raises(ValueError, match='a holds non-finite'):
            check_finite({'a': torch.full((3,), torch.inf).to(torch.float8_e5m2)})
        with pytest.raises(ValueError, match='b holds non-finite'):
            check_finite({'b': torch.tensor([1j * torch.inf])})

    def test_more(self, module):
        state = module.state_dict() | {'1.gamma': torch.ones(1), '2.weight': 3}
        with pytest.raises(RuntimeError, match=r"has 1 entries .*'1\.gamma'"):
            check_no_more(module, state, '')


def test_load_pretrained_reports_the_file(file):
    module = torch.nn.Linear(2, 2)
    torch.save(dict(state_dict={5: 1}), file)
    with pytest.raises(ValueError, match=r'file\.pth: .*entry 5'):
        load_pretrained(module, file)


class TestResumable:
    def whole(self):
        return runner_checkpoint()

    def test_a_runner_checkpoint(self):
        check_resumable(self.whole())

    @pytest.mark.parametrize(
        ('part', 'key'),
        [('meta', 'epoch'), ('meta', 'iter'), ('message_hub', 'runtime_info')],
    )
    def test_what_is_missing(self, part, key):
        content = self.whole()
        del content[part][key]
        with pytest.raises(ValueError, match=rf'lacks {part}\.{key}, .*load_from'):
            check_resumable(content)
        content[part] = 'text'
        with pytest.raises(ValueError, match=f'lacks {part}'):
            check_resumable(content)


class Text(str):
    pass


HISTORY_BUFFER = HistoryBuffer([1.0, 2.0], [1, 1])
NAMED = namedtuple('NAMED', 'a')
READABLE = [
    None, True, 3, -(2**70), 1.5, 1j, 'text', b'bytes', b'', bytearray(b'x'),
    (1, 'a'), {1, 2}, OrderedDict(a=1), Counter('aab'), slice(1, None, 2),
    ConfigDict(a=ConfigDict(b=[1])), {3: 1, (1, 2): 'a', 1.5: None, None: 2},
    torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse(),
    torch.Size([1, 2]), torch.float16, torch.device('cpu'), torch.strided,
    HISTORY_BUFFER, HistoryBuffer(), np.zeros((2, 3), '>f4'), np.array([], np.uint8),
    np.asfortranarray(np.ones((2, 3))), np.array(1.0), np.array(['a', 'bc']),
    np.array([b'a']), np.array('2020-01-01', 'datetime64[D]'), np.dtype('f4'),
    np.str_('a'), np.bytes_(b'a'), *(np.dtype(c).type(1) for c in '?bhilqpefdFD'),
    *(np.dtype(c).type(1) for c in 'BHILQP'),
]  # fmt: skip
UNREADABLE = [
    defaultdict(int), Path('a'), datetime(2020, 1, 1), NAMED(1), Text('a'), len, print,
    object(), range(3), frozenset([1]), np.array([object()], object), deque([1]),
    np.zeros(2, [('a', 'f4')]), np.ma.array([1]), torch.__version__, torch.nn.ReLU(),
    torch.memory_format, partial(len, 'a'), {Path('a'): 1}, dict,
]  # fmt: skip


def entries():
    """Nested containers of what can be read and what cannot."""
    leaf = st.sampled_from(READABLE) | st.sampled_from(UNREADABLE)
    return st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from('abc'), inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from('ab'), inner).map(OrderedDict)
        ),
        max_leaves=4,
    )


class TestUnreadable:
    def can_be_read(self, content, folder):
        path = str(folder / 'file.pth')
        torch.save(content, path)
        try:
            read_checkpoint(path)
        except ValueError:
            return False
        return True

    @pytest.mark.parametrize('value', READABLE, ids=lambda v: type(v).__name__)
    def test_what_can_be_read(self, value, tmp_path):
        assert unreadable_entries(dict(a=dict(b=[value]))) == []
        assert self.can_be_read(dict(a=dict(b=[value])), tmp_path)

    @pytest.mark.parametrize('value', UNREADABLE, ids=lambda v: type(v).__name__)
    def test_what_cannot(self, value, tmp_path):
        (said,) = unreadable_entries(dict(a=dict(b=[0, value])))
        assert said.startswith('a.b[1]')
        assert not self.can_be_read(dict(a=dict(b=[0, value])), tmp_path)

    @settings(max_examples=60)
    @given(content=entries())
    def test_agrees_with_the_reader(self, content, tmp_path_factory):
        folder = tmp_path_factory.mktemp('file')
        found = unreadable_entries(dict(a=content))
        assert (found == []) == self.can_be_read(dict(a=content), folder)

    def test_places_and_types_are_named(self):
        content = dict(meta=dict(when=datetime(2020, 1, 1), to=[Path('a')]))
        content['meta']['again'] = content['meta']
        assert unreadable_entries(content) == [
            'meta.when (datetime)',
            f'meta.to[0] ({type(Path("a")).__name__})',
        ]

    def test_metadata_of_a_state_dict(self):
        state = OrderedDict(a=torch.ones(1))
        state._metadata = {'': dict(version=Path('a'))}
        assert len(unreadable_entries(dict(state_dict=state))) == 1

    def test_it_costs_little(self):
        tensors = {f'w{i}': torch.ones(1) for i in range(5000)}
        content = dict(
            state_dict=tensors, optimizer=dict(state=dict(enumerate(tensors)))
        )
        start = time.perf_counter()
        assert unreadable_entries(content) == []
        assert time.perf_counter() - start < 0.5
