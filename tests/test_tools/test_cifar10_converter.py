"""tools/dataset_converters/cifar10.py, on small archives of the real layouts."""

import io
import pickle
import subprocess
import sys
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import cv2
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/dataset_converters/cifar10.py'


@pytest.fixture
def converter(monkeypatch):
    """The script as a module, for a data set of two and one images a class."""
    spec = spec_from_file_location('cifar10_converter', SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'COUNTS', dict(train=2, test=1))
    return module


def images(number, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)


def write_archive(path, members):
    """Write a tar archive of (name, bytes) pairs; None makes a folder."""
    with tarfile.open(path, f'w:{path.suffix[1:]}') as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data or b''))
    return path


def jpeg_members(classes, train=2):
    members = [('train/', None), ('test/', None)]
    for k, name in enumerate(classes):
        for split, number in (('train', train), ('test', 1)):
            for i, image in enumerate(images(number, seed=k)):
                data = cv2.imencode('.jpg', image)[1].tobytes()
                members.append((f'{split}/{name}/{i:04d}.jpg', data))
    return members


def batch(labels, seed, **replaced):
    """An official batch: rows of 3,072 bytes, all red ones first."""
    data = images(len(labels), seed).transpose(0, 3, 1, 2).reshape(-1, 3072)
    return pickle.dumps({b'data': data, b'labels': labels, **replaced}, protocol=2)


def python_members():
    """Ten training images a class-in-turn batch, two such batches, one for testing."""
    folder = 'cifar-10-batches-py'
    labels = list(range(10))
    return [
        (f'{folder}/batches.meta', b'not needed'),
        (f'{folder}/readme.html', b'not needed'),
        (f'{folder}/data_batch_1', batch(labels, seed=1)),
        (f'{folder}/data_batch_2', batch(labels[::-1], seed=2)),
        (f'{folder}/test_batch', batch(labels, seed=3)),
    ]


@pytest.fixture
def jpeg_archive(converter, tmp_path):
    return write_archive(tmp_path / 'jpeg.tar.xz', jpeg_members(converter.CLASSES))


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.*g'))


def test_jpeg_archive_is_unpacked_unchanged(converter, jpeg_archive, tmp_path):
    dst = tmp_path / 'data' / 'cifar10'
    assert converter.convert(str(jpeg_archive), str(dst))
    assert len(files(dst)) == 30
    # Names are unique over all classes: pictures of predictions are called by them.
    assert len({Path(f).name for f in files(dst / 'train')}) == 20
    members = dict(jpeg_members(converter.CLASSES))
    assert (dst / 'train/cat/cat_0001.jpg').read_bytes() == members[
        'train/cat/0001.jpg'
    ]
    assert sorted(p.name for p in dst.parent.iterdir()) == ['cifar10']


def test_python_archive_becomes_lossless_images(converter, tmp_path):
    src = write_archive(tmp_path / 'python.tar.gz', python_members())
    dst = tmp_path / 'cifar10'
    assert converter.convert(str(src), str(dst))
    assert len(files(dst)) == 30
    # Class 3 is at place 3 of the first batch and at place 6 of the second.
    for name, seed, place in (
        ('train/cat/cat_00003.png', 1, 3),
        ('train/cat/cat_10006.png', 2, 6),
        ('test/cat/cat_00003.png', 3, 3),
    ):
        image = cv2.imread(str(dst / name))[..., ::-1]
        np.testing.assert_array_equal(image, images(10, seed)[place])


def test_a_complete_folder_is_left_alone(converter, jpeg_archive, tmp_path):
    dst = tmp_path / 'cifar10'
    assert converter.convert(str(jpeg_archive), str(dst))
    marked = dst / 'train/cat/cat_0000.jpg'
    marked.write_bytes(b'mine')
    assert not converter.convert(str(jpeg_archive), str(dst))
    assert marked.read_bytes() == b'mine'
    assert converter.convert(str(jpeg_archive), str(dst), force=True)
    assert marked.read_bytes() != b'mine'
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ['cifar10', 'jpeg.tar.xz']


def test_a_foreign_folder_is_left_alone(converter, jpeg_archive, tmp_path):
    dst = tmp_path / 'cifar10'
    dst.mkdir()
    (dst / 'notes.txt').write_text('mine')
    with pytest.raises(converter.ConversionError, match='has 0 images'):
        converter.convert(str(jpeg_archive), str(dst))
    assert (dst / 'notes.txt').read_text() == 'mine'


def test_an_interrupted_run_can_be_started_again(converter, jpeg_archive, tmp_path):
    dst = tmp_path / 'cifar10'
    leftover = tmp_path / 'cifar10.partial' / 'train' / 'cat'
    leftover.mkdir(parents=True)
    (leftover / 'half.jpg').write_bytes(b'half')
    assert converter.convert(str(jpeg_archive), str(dst))
    assert len(files(dst)) == 30 and not leftover.exists()


def test_failing_leaves_the_old_folder(converter, jpeg_archive, tmp_path):
    dst = tmp_path / 'cifar10'
    converter.convert(str(jpeg_archive), str(dst))
    before = files(dst)
    src = write_archive(tmp_path / 'less.tar.xz', jpeg_members(converter.CLASSES, 1))
    with pytest.raises(converter.ConversionError, match='train/airplane has 1 images'):
        converter.convert(str(src), str(dst), force=True)
    assert files(dst) == before


@pytest.mark.parametrize(
    'name',
    ['../outside.jpg', '/outside.jpg', 'train/cat/../../../outside.jpg', 'a.txt'],
)
def test_unknown_members_are_refused_and_not_written(converter, tmp_path, name):
    src = write_archive(tmp_path / 'odd.tar.gz', [(name, b'outside')])
    with pytest.raises(converter.ConversionError, match='neither CIFAR-10 archive'):
        converter.convert(str(src), str(tmp_path / 'inner' / 'cifar10'))
    assert not list(tmp_path.rglob('outside*'))
    assert not Path('/outside.jpg').exists()


def test_links_are_refused(converter, tmp_path):
    src = tmp_path / 'link.tar.gz'
    with tarfile.open(src, 'w:gz') as archive:
        info = tarfile.TarInfo('train/cat/0000.jpg')
        info.type, info.linkname = tarfile.SYMTYPE, '/etc/hostname'
        archive.addfile(info)
    with pytest.raises(converter.ConversionError, match='neither CIFAR-10 archive'):
        converter.convert(str(src), str(tmp_path / 'cifar10'))


class Code:
    """Pickles to a call, as a hostile file would."""

    def __reduce__(self):
        return Path.touch, (Path('ran'),)


@pytest.mark.parametrize(
    'data',
    [
        b'no pickle',
        batch([0], 0, evil=Code()),
        pickle.dumps({b'data': 0}),
        pickle.dumps({b'data': 0, b'labels': [0]}),
        batch([10], 0),
    ],
    ids=['no pickle', 'code', 'no labels', 'no images', 'no such class'],
)
def test_bad_batches_are_refused(converter, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    src = write_archive(
        tmp_path / 'bad.tar.gz', [('cifar-10-batches-py/data_batch_1', data)]
    )
    with pytest.raises(converter.ConversionError, match='not a CIFAR-10 batch'):
        converter.convert(str(src), str(tmp_path / 'cifar10'))
    assert not (tmp_path / 'ran').exists()


def test_damaged_images_and_archives_are_refused(converter, jpeg_archive, tmp_path):
    dst = str(tmp_path / 'cifar10')
    members = [('train/cat/0000.jpg', b'no image')]
    src = write_archive(tmp_path / 'damaged.tar.gz', members)
    with pytest.raises(converter.ConversionError, match='not a 32x32 image'):
        converter.convert(str(src), dst)

    cut = tmp_path / 'cut.tar.xz'
    cut.write_bytes(jpeg_archive.read_bytes()[: jpeg_archive.stat().st_size // 2])
    with pytest.raises(converter.ConversionError, match='could not be unpacked'):
        converter.convert(str(cut), dst)
    assert not Path(dst).exists()


def run(*args):
    return subprocess.run(
        [sys.executable, SCRIPT, *args], capture_output=True, text=True, check=False
    )


def test_command_line_says_what_is_wrong(tmp_path):
    result = run(tmp_path / 'absent.tar.gz', tmp_path / 'cifar10')
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1
    assert 'absent.tar.gz does not exist' in result.stderr


@pytest.mark.slow
def test_the_whole_archive(shared_dir, tmp_path):
    src, dst = shared_dir / 'data' / 'cifar10_jpeg.tar.xz', tmp_path / 'cifar10'
    result = run(src, dst)
    assert result.returncode == 0, result.stderr
    assert '50,000 training and 10,000 test images' in result.stdout
    assert len(list(dst.glob('train/*/*.jpg'))) == 50000
    assert len(list(dst.glob('test/*/*.jpg'))) == 10000
