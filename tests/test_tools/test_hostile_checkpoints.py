"""Checkpoints that would run a command, or are none: each ends in a sentence.

Every payload is shown to run its command where nothing stands in its way.
"""

import functools
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader

from mdeq_mm.checkpoints import allow_runner_checkpoints, read_checkpoint
from mdeq_mm.registry import MODELS
from tests.image_folders import CIFAR10, write_class_folder

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'
CAMVID = ROOT / 'configs/camvid/fcn_mdeq_short_1xb4-1400it_camvid-180x240.py'
RESNET = ROOT / 'configs/cifar10/resnet50_2xb64-50e_cifar10.py'
IN_PROCESS = [f'{stage}_dataloader.num_workers=0' for stage in ('train', 'val', 'test')]
FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'

pytestmark = [
    pytest.mark.filterwarnings('ignore:Detected pickle protocol'),
    pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning'),
    pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning'),
]


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def name(module, attribute):
    return f'c{module}\n{attribute}\n'.encode()


def text(value):
    value = value.encode()
    return b'X' + struct.pack('<I', len(value)) + value


def attribute_of(owner, attribute):
    return name('builtins', 'getattr') + owner + text(attribute) + b'\x86R'


def through_globals(command):
    """Reaches os.system by attributes alone, and has torch call it.

    With all of getattr allowed, weights_only=True does not stop it.
    """
    space = attribute_of(name('torch._utils', '_rebuild_tensor_v2'), '__globals__')
    buffer = name('mmengine.logging.history_buffer', 'HistoryBuffer')
    code = b'\x80\x02}' + text('state_dict') + buffer + b')\x81' + space + b'bq\x02s'
    system = attribute_of(attribute_of(b'h\x02', 'os'), 'system')
    code += text('x') + name('torch._tensor', '_rebuild_from_type_v2')
    return code + b'(' + system + text('x') + text(command) + b'\x85}tRs.'


def pickled(value, protocol=2):
    return pickle.dumps(dict(state_dict={}, extra=value), protocol)


def object_array(value):
    array = np.empty(1, object)
    array[0] = value
    return array


def payloads(mark):
    """Pickles that write a file, by name."""
    command, program = f'touch {mark}', f'open({str(mark)!r}, "w").close()'
    system = Call(os.system, command)
    return {
        'system': pickled(system),
        'exec': pickled(Call(exec, program)),
        'eval': pickled(Call(eval, program)),
        'popen': pickled(Call(os.popen, command)),
        'partial': pickled(Call(functools.partial(os.system, command))),
        'path': pickled(Call(Path.touch, mark)),
        'object array': pickled(object_array(system)),
        'in a key': pickle.dumps({system: 1}, 2),
        'as all of it': pickle.dumps(system, 2),
        'old protocol': pickled(system, 0),
        'new protocol': pickled(system, 5),
        'runstring': b'\x80\x02' + name('numpy.testing', 'runstring')
        + text(program) + b'}\x86R.',
        'tensor': b'\x80\x02' + name('torch._tensor', '_rebuild_from_type_v2')
        + b'(' + name('posix', 'system') + text('x') + text(command) + b'\x85}tR.',
        'through globals': through_globals(command),
    }  # fmt: skip


PAYLOADS = tuple(payloads(Path('x')))


def in_archive(path, code):
    """As torch.save writes it."""
    torch.save(dict(state_dict=dict(a=torch.ones(2))), path)
    with zipfile.ZipFile(path) as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for part, content in parts.items():
            archive.writestr(part, code if part.endswith('data.pkl') else content)


def in_old_format(path, code):
    """As torch.save wrote it before version 1.6."""
    torch.save(dict(a=1), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    pattern = pickle.dumps(dict(a=1), 2)
    assert content.count(pattern) == 1
    path.write_bytes(content.replace(pattern, code))


def in_tar(path, code):
    """As torch.save wrote it before version 0.1.10."""
    part = path.with_name('pickle')
    part.write_bytes(code)
    with tarfile.open(path, 'w') as archive:
        for member in ('storages', 'tensors', 'pickle'):
            archive.add(part, member)


WRITERS = dict(
    archive=in_archive,
    old=in_old_format,
    pickle=lambda path, code: path.write_bytes(code),
    tar=in_tar,
)


@pytest.fixture
def mark(tmp_path):
    """The file that a command writes."""
    return tmp_path / 'ran'


def refused(load, path):
    with pytest.raises(ValueError, match='cannot be read as a checkpoint') as found:
        load(str(path))
    said = str(found.value)
    assert path.name in said and '\n' not in said
    return said


class TestReading:
    @pytest.mark.parametrize('kind', PAYLOADS)
    def test_the_control_runs_it(self, mark, kind):
        try:
            found = pickle.loads(payloads(mark)[kind])
            if kind == 'popen':
                found['extra'].close()
            if kind == 'partial':
                found['extra']()
        except (AttributeError, TypeError):
            # After the command has run.
            assert kind in ('tensor', 'through globals', 'partial')
        assert mark.exists() or kind == 'partial'

    @pytest.mark.parametrize('writer', WRITERS)
    @pytest.mark.parametrize('kind', PAYLOADS)
    def test_it_is_not_run(self, tmp_path, mark, kind, writer):
        path = tmp_path / 'evil.pth'
        WRITERS[writer](path, payloads(mark)[kind])
        said = refused(read_checkpoint, path)
        # The oldest protocol is a text.
        as_text = (kind, writer) == ('old protocol', 'pickle')
        assert ('begins with' if as_text else 'not run') in said
        if (kind, writer) == ('system', 'archive'):
            assert 'asks for posix.system, which is not data' in said
        # As the toolboxes read it from here on, and torch.hub what it downloads.
        allow_runner_checkpoints()
        refused(CheckpointLoader.load_checkpoint, path)
        with pytest.raises((pickle.UnpicklingError, RuntimeError, ValueError)):
            torch.load(path, weights_only=False)
        assert not mark.exists()

    @pytest.mark.parametrize('allowed', [getattr, (getattr, 'builtins.getattr')])
    def test_others_may_have_allowed_all_of_getattr(self, tmp_path, mark, allowed):
        path = tmp_path / 'evil.pth'
        in_archive(path, through_globals(f'touch {mark}'))
        torch.serialization.add_safe_globals([allowed])
        said = refused(read_checkpoint, path)
        assert "it asks for '__globals__' of _rebuild_tensor_v2" in said
        assert allowed in torch.serialization.get_safe_globals()
        allow_runner_checkpoints()
        assert allowed not in torch.serialization.get_safe_globals()
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            torch.load(path)
        assert not mark.exists()

    def test_what_the_user_has_set_does_not_bring_it_back(
        self, tmp_path, mark, monkeypatch
    ):
        path = tmp_path / 'evil.pth'
        in_archive(path, payloads(mark)['system'])
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
        refused(read_checkpoint, path)
        assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'
        allow_runner_checkpoints()
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path)
        assert not mark.exists()

    def test_processes_inherit_it(self):
        allow_runner_checkpoints()
        code = f'import os; print(os.environ[{FORCE!r}])'
        found = subprocess.run([sys.executable, '-c', code], capture_output=True)
        assert found.stdout.strip() == b'1'

    def test_downloads(self, tmp_path, mark, monkeypatch):
        """Which torch.hub reads with weights_only=False."""
        path = tmp_path / 'evil.pth'
        in_archive(path, payloads(mark)['system'])
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        (tmp_path / 'hub/checkpoints').mkdir(parents=True)
        path.rename(tmp_path / 'hub/checkpoints/evil.pth')
        address = 'http://localhost:9/evil.pth'
        with pytest.raises(ValueError, match=r'asks for posix\.system'):
            read_checkpoint(address)
        allow_runner_checkpoints()
        with pytest.raises(ValueError, match=r'asks for posix\.system'):
            CheckpointLoader.load_checkpoint(address)
        assert not mark.exists()
        with pytest.raises(ValueError, match=r'no\.pth .*it could not be downloaded'):
            read_checkpoint('http://localhost:9/no.pth')


class TestFormats:
    @pytest.fixture
    def whole(self, tmp_path):
        state = {f'layer{i}.weight': torch.randn(16, 16) for i in range(8)}
        path = tmp_path / 'whole.pth'
        torch.save(dict(state_dict=state, meta=dict(epoch=1)), path)
        return path.read_bytes()

    def test_cut_anywhere(self, tmp_path, whole):
        path = tmp_path / 'cut.pth'
        cuts = random.Random(0).sample(range(1, len(whole)), 60)
        for size in [1, 2, 3, 4, len(whole) - 1, *cuts]:
            path.write_bytes(whole[:size])
            assert refused(read_checkpoint, path)

    def test_any_bit_flipped(self, tmp_path, whole):
        """Torch itself does not compare a file with its checksums."""
        path = tmp_path / 'flipped.pth'
        wanted = read_checkpoint(self.write(path, whole))['state_dict']
        draw, refusals, unnoticed = random.Random(0), 0, 0
        for _ in range(150):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with torch.serialization.safe_globals([]):
                try:
                    found = torch.load(path, weights_only=True)
                    unnoticed += not same(found.get('state_dict', {}), wanted)
                except Exception:
                    pass
            try:
                found = read_checkpoint(str(path))['state_dict']
            except ValueError as error:
                assert 'flipped.pth' in str(error)
                refusals += 1
            else:
                # Padding between the entries.
                assert same(found, wanted)
        assert refusals > 30 and unnoticed > 30

    def write(self, path, content):
        path.write_bytes(content)
        return str(path)

    def test_without_checksums(self, tmp_path):
        if not hasattr(torch.serialization, 'set_crc32_options'):
            pytest.skip('this PyTorch always writes checksums')
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(dict(a=torch.arange(5)), tmp_path / 'plain.pth')
        finally:
            torch.serialization.set_crc32_options(True)
        found = read_checkpoint(str(tmp_path / 'plain.pth'))
        assert found['a'].tolist() == [0, 1, 2, 3, 4]

    def test_old_format(self, tmp_path):
        path = tmp_path / 'old.pth'
        torch.save(dict(a=torch.arange(3)), path, _use_new_zipfile_serialization=False)
        assert read_checkpoint(str(path))['a'].tolist() == [0, 1, 2]
        content = path.read_bytes()
        for size in range(1, len(content), 7):
            path.write_bytes(content[:size])
            refused(read_checkpoint, path)

    @pytest.mark.parametrize(
        ('content', 'words'),
        [
            (b'', 'is empty'),
            (b'<!DOCTYPE html>\n<html>', "text that begins with '<!DOCTYPE html>"),
            (b'{"error": "not found"}', "text that begins with '{"),
            (b'version https://git-lfs.github.com/spec/v1\noid', 'begins with'),
            (b'\x89HDF\r\n\x1a\n' + bytes(50), 'of another format'),
            (b'PK\x03\x04' + bytes(50), 'damaged'),
            (b'\x80\x02}q\x00.' + bytes(9), None),
            (bytes(1000), 'of another format'),
        ],
    )
    def test_other_files(self, tmp_path, content, words):
        path = tmp_path / 'other.pth'
        path.write_bytes(content)
        assert words is None or words in refused(read_checkpoint, path)

    def test_other_archives(self, tmp_path):
        path = tmp_path / 'script.pth'
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
        assert 'a TorchScript archive, which is a program' in refused(
            read_checkpoint, path
        )
        path = tmp_path / 'arrays.pth'
        with path.open('wb') as file:
            np.savez(file, a=np.ones(3))
        refused(read_checkpoint, path)

    def test_a_folder_and_nothing(self, tmp_path):
        with pytest.raises(IsADirectoryError, match='is a folder: name a file in it'):
            read_checkpoint(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r'no\.pth does not exist'):
            read_checkpoint(str(tmp_path / 'no.pth'))

    def test_meta_of_another_kind(self, tmp_path):
        torch.save(dict(state_dict={}, meta='x'), tmp_path / 'meta.pth')
        with pytest.raises(ValueError, match='holds a str under meta, not a dict'):
            read_checkpoint(str(tmp_path / 'meta.pth'))


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(found[key], wanted[key]) for key in wanted
    )


# Tools


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('cifar10')
    return write_class_folder(root, CIFAR10, dict(train=1, test=1), size=32)


@pytest.fixture
def refuses(monkeypatch, tmp_path, capsys):
    """Call a tool that has to end in one sentence; return the sentence."""

    def run(tool, *arguments):
        path = ROOT / 'tools' / f'{tool}.py'
        for home in (path.parent, ROOT / 'tools'):
            monkeypatch.syspath_prepend(home)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('LOCAL_RANK', '0')
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        # Python's own standard library has a package called test.
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        with pytest.raises(SystemExit) as stop:
            import_module(path.stem).main()
        assert isinstance(stop.value.code, str), capsys.readouterr().err
        assert '\n' not in stop.value.code
        return stop.value.code

    return run


def options(folder, tmp_path, *settings):
    return ['--data-root', folder, '--work-dir', tmp_path / 'work', '--cfg-options',
            *IN_PROCESS, *settings]  # fmt: skip


@pytest.fixture
def evil(tmp_path, mark):
    path = tmp_path / 'evil.pth'
    in_archive(path, payloads(mark)['through globals'])
    yield path
    assert not mark.exists()


@pytest.fixture
def unguarded(tmp_path):
    """A config as it comes without our hook."""
    path = tmp_path / 'unguarded.py'
    path.write_text(f'_base_ = {str(RESNET)!r}\ndefault_hooks = dict(_delete_=True)\n')
    return path


class TestTools:
    def assert_said(self, said, evil):
        assert str(evil) in said and 'cannot be read as a checkpoint' in said
        assert 'which was not run' in said

    def test_training_from_it(self, refuses, evil, folder, tmp_path):
        found = refuses('train', TINY, *options(folder, tmp_path, f'load_from={evil}'))
        self.assert_said(found, evil)

    def test_resuming(self, refuses, evil, folder, tmp_path):
        common = options(folder, tmp_path)
        self.assert_said(refuses('train', TINY, '--resume', evil, *common), evil)

    def test_resuming_by_itself(self, refuses, evil, folder, tmp_path):
        work = tmp_path / 'work'
        work.mkdir()
        evil.rename(work / 'epoch_1.pth')
        (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
        found = refuses('train', TINY, '--resume', *options(folder, tmp_path))
        self.assert_said(found, work / 'epoch_1.pth')

    @pytest.mark.parametrize(
        ('config', 'part'),
        [
            (TINY, 'backbone'),
            (TINY, 'head'),
            (RESNET, 'backbone'),
            (RESNET, None),
            (None, 'backbone'),
        ],
    )
    def test_pretrained_parts(
        self, refuses, evil, folder, tmp_path, unguarded, config, part
    ):
        place = f'model.{part}.init_cfg' if part else 'model.init_cfg'
        settings = [f'{place}.type=Pretrained', f'{place}.checkpoint={evil}']
        if part == 'head':
            settings.append(f'{place}._delete_=True')
        common = options(folder, tmp_path, *settings)
        self.assert_said(refuses('train', config or unguarded, *common), evil)

    @pytest.mark.parametrize('tta', [[], ['--tta']])
    def test_testing(self, refuses, evil, folder, tmp_path, tta):
        common = options(folder, tmp_path)
        self.assert_said(refuses('test', RESNET, evil, *tta, *common), evil)

    def test_converting(self, refuses, evil, tmp_path):
        found = refuses('model_converters/mdeq2mm', evil, tmp_path / 'out.pth',
                        '--task', 'cls')  # fmt: skip
        self.assert_said(found, evil)
        assert not (tmp_path / 'out.pth').exists()

    def test_analysis(self, refuses, evil, folder, tmp_path):
        frames = tmp_path / 'frames'
        frames.mkdir()
        cv2.imwrite(str(frames / 'a.png'), np.zeros((32, 32, 3), np.uint8))
        tools = 'analysis_tools/'
        commands = [
            [f'{tools}convergence', TINY, evil, '--data-root', folder],
            [f'{tools}benchmark', '--cases', 'ResNet-50', '--weights', evil],
        ]
        if CAMVID.exists():
            commands += [
                [f'{tools}anytime', CAMVID, evil, frames / 'a.png'],
                [f'{tools}warm_start', CAMVID, evil, frames],
                [f'{tools}inference_cost', f'{CAMVID}={evil}', '--shape', '32', '32'],
            ]
        for command in commands:
            self.assert_said(refuses(*command), evil)


class TestMisfits:
    """Files that are read, and hold something else."""

    @pytest.fixture
    def file(self, tmp_path):
        def write(content):
            torch.save(content, tmp_path / 'file.pth')
            return tmp_path / 'file.pth'

        return write

    @pytest.mark.parametrize(
        ('content', 'words'),
        [
            ([torch.ones(2)], 'holds a list, not a dict'),
            (torch.ones(2), 'holds a Tensor, not a dict'),
            ({'a.weight': torch.ones(2)}, 'lacks'),
            ({'state_dict': {'a.weight': 3}}, 'lacks'),
            ({'state_dict': {}}, 'lacks'),
            ({}, 'lacks'),
        ],
    )
    def test_contents(self, refuses, file, folder, tmp_path, content, words):
        path = file(content)
        said = refuses('test', RESNET, path, *options(folder, tmp_path))
        assert words in said and 'file.pth' in said

    def test_weights_alone_cannot_be_resumed(self, refuses, file, folder, tmp_path):
        cfg = Config.fromfile(TINY)
        init_default_scope('mmpretrain')
        state = MODELS.build(cfg.model).state_dict()
        common = options(folder, tmp_path)
        said = refuses('train', TINY, '--resume', file(dict(state_dict=state)), *common)
        assert 'lacks meta.epoch' in said and 'load_from' in said
        # Of another number of classes, and of another model altogether.
        state['head.fc.weight'] = state['head.fc.weight'][:5]
        said = refuses('test', TINY, file(state), *common)
        assert 'head.fc.weight has shape (5, ' in said
        said = refuses(
            'train', TINY, *options(folder, tmp_path, f'load_from={file({"x": 1})}')
        )
        assert (
            "none of its 1 names, which begin with ['x'], is one of the model" in said
        )


def test_from_the_shell(tmp_path, folder, mark):
    """As users start them: one line on the error stream and a status that says so."""
    evil = tmp_path / 'evil.pth'
    in_old_format(evil, payloads(mark)['system'])
    work = ['--data-root', folder, '--work-dir', tmp_path / 'work']
    settings = ['--cfg-options', *IN_PROCESS]
    for command in (
        ['train.py', TINY, *work, '--resume', evil, *settings],
        ['test.py', TINY, evil, *work, *settings],
        ['model_converters/mdeq2mm.py', evil, tmp_path / 'out.pth', '--task', 'seg'],
    ):
        command[0] = ROOT / 'tools' / command[0]
        found = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {'PYTHONPATH': str(ROOT)},
        )
        lines = found.stderr.strip().splitlines()
        assert found.returncode == 1, found.stderr
        assert 'Traceback' not in found.stderr
        assert str(evil) in lines[-1] and 'which was not run' in lines[-1]
    assert not mark.exists()
