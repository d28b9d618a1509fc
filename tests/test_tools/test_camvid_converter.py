"""tools/dataset_converters/camvid.py, on small archives of the real layout."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import load_tool

SCRIPT = 'tools/dataset_converters/camvid.py'
COUNTS = dict(train=3, val=1, test=2)
SIZE = (24, 18)


@pytest.fixture
def converter(monkeypatch):
    """The script as a module, for a data set of six images."""
    module = load_tool(SCRIPT)
    monkeypatch.setattr(module, 'COUNTS', COUNTS)
    return module


def encoded(array, kind, mode=None):
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, kind)
    return file.getvalue()


def picture(seed, size=SIZE):
    array = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return encoded(array, 'JPEG')


def labels(seed, size=SIZE):
    """All labels from 0 to 11, in some order and number."""
    array = np.random.default_rng(seed).integers(0, 12, size[::-1], np.uint8)
    array[0, :12] = np.arange(12)
    return array


def members():
    """Bytes of the files of a whole archive by name, images before label maps."""
    stems = [(split, f'Seq_f{i:03d}') for split, n in COUNTS.items() for i in range(n)]
    images = {
        f'images/{split}/{stem}.jpg': picture(i)
        for i, (split, stem) in enumerate(stems)
    }
    return images | {
        f'annotations/{split}/{stem}.png': encoded(labels(i), 'PNG')
        for i, (split, stem) in enumerate(stems)
    }


def write_archive(path, files):
    with tarfile.open(path, 'w') as archive:
        for folder in ('images', 'images/train'):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / 'camvid.tar', members())


@pytest.fixture
def dst(tmp_path):
    return tmp_path / 'data' / 'camvid'


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.*g'))


def test_images_are_unchanged_and_labels_are_ready_for_mmseg(converter, archive, dst):
    assert converter.convert(archive, str(dst))
    whole = members()
    assert files(dst) == sorted(whole)
    palette = [c for color in converter.CLASSES.values() for c in color]
    for name, data in whole.items():
        if name.endswith('.jpg'):
            assert (dst / name).read_bytes() == data
            continue
        expected = np.array(Image.open(io.BytesIO(data)))
        expected[expected == 11] = 255
        with Image.open(dst / name) as found:
            np.testing.assert_array_equal(np.array(found), expected)
            assert found.mode == 'P' and found.getpalette()[:33] == palette
    assert [p.name for p in dst.parent.iterdir()] == ['camvid']


def test_indices_of_a_palette_are_labels_too(converter, tmp_path, dst):
    """A label map is what its pixels index, whatever they are drawn in."""
    drawn = Image.fromarray(labels(7))
    drawn.putpalette(range(255, -1, -1))
    file = io.BytesIO()
    drawn.save(file, 'PNG')
    name = 'annotations/val/Seq_f000.png'
    src = write_archive(tmp_path / 'drawn.tar', members() | {name: file.getvalue()})
    assert converter.convert(src, str(dst))
    expected = labels(7)
    expected[expected == 11] = 255
    np.testing.assert_array_equal(np.array(Image.open(dst / name)), expected)


def test_a_complete_folder_is_left_alone(converter, archive, dst):
    assert converter.convert(archive, str(dst))
    marked = dst / 'images/train/Seq_f000.jpg'
    marked.write_bytes(b'mine')
    assert not converter.convert(archive, str(dst))
    assert marked.read_bytes() == b'mine'
    assert converter.convert(archive, str(dst), force=True)
    assert marked.read_bytes() != b'mine'
    assert [p.name for p in dst.parent.iterdir()] == ['camvid']


def test_an_interrupted_run_can_be_started_again(converter, archive, dst):
    leftover = dst.parent / 'camvid.partial' / 'images' / 'train'
    leftover.mkdir(parents=True)
    (leftover / 'half.jpg').write_bytes(b'half')
    assert converter.convert(archive, str(dst))
    assert files(dst) == sorted(members()) and not leftover.exists()


def test_a_foreign_folder_is_left_alone(converter, archive, dst):
    dst.mkdir(parents=True)
    (dst / 'notes.txt').write_text('mine')
    with pytest.raises(converter.ConversionError, match='train has 0 images'):
        converter.convert(archive, str(dst))
    assert (dst / 'notes.txt').read_text() == 'mine'


IMAGE, LABELS = 'images/val/Seq_f000.jpg', 'annotations/val/Seq_f000.png'
TWELVE = np.full(SIZE[::-1], 12, np.uint8)
FAULTS = {
    'label 12': (LABELS, encoded(TWELVE, 'PNG'), 'holds the label 12'),
    'already 255': (LABELS, encoded(TWELVE * 0 + 255, 'PNG'), 'the label 255'),
    'colours': (LABELS, encoded(labels(0), 'PNG', 'RGB'), 'is of mode RGB'),
    'small labels': (LABELS, encoded(labels(0, (12, 9)), 'PNG'), '12x9 pixels, and'),
    'small image': (IMAGE, picture(0, (12, 9)), 'its counterpart 12x9'),
    'no image': (IMAGE, b'no image', f'{IMAGE} in the archive is not a readable JPEG'),
    'no labels': (LABELS, b'', f'{LABELS} in the archive is not a readable PNG'),
    'half an image': (IMAGE, picture(0)[:-300], 'not a readable JPEG'),
    'half a label map': (LABELS, encoded(labels(0), 'PNG')[:-60], 'not a readable PNG'),
    'another format': (IMAGE, encoded(labels(0), 'PNG'), 'not a readable JPEG'),
    'image is missing': (IMAGE, None, f'not complete: {LABELS} has no image, and 1 mo'),
    'labels are missing': (LABELS, None, f'not complete: {IMAGE} has no label map'),
    'one too many': ('images/val/x.jpg', picture(0), 'x.jpg has no label map'),
    'a third file': ('notes.txt', b'', "holds 'notes.txt', which CamVid does not"),
    'another split': ('images/demo/a.jpg', picture(0), "'images/demo/a.jpg', which"),
    'upwards': ('../outside.jpg', picture(0), r"'\.\./outside.jpg', which CamVid"),
    'root': ('/outside.jpg', picture(0), "'/outside.jpg', which CamVid"),
    'winding': (
        'images/val/../../../outside.jpg', picture(0), 'outside.jpg., which CamVid',
    ),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_named_and_the_old_folder_stays(
    converter, archive, tmp_path, dst, fault
):
    converter.convert(archive, str(dst))
    before = files(dst)
    name, data, said = FAULTS[fault]
    changed = members() | {name: data}
    if data is None:
        del changed[name]
    src = write_archive(tmp_path / 'changed.tar', changed)
    with pytest.raises(converter.ConversionError, match=said):
        converter.convert(src, str(dst), force=True)
    assert files(dst) == before
    assert not list(tmp_path.rglob('outside*'))
    assert not Path('/outside.jpg').exists()


def test_a_split_that_lacks_a_pair_is_not_complete(converter, tmp_path, dst):
    changed = members()
    for name in (IMAGE, LABELS):
        del changed[name]
    src = write_archive(tmp_path / 'less.tar', changed)
    with pytest.raises(converter.ConversionError, match='val has 0 images instead of'):
        converter.convert(src, str(dst))
    assert not dst.exists()


def test_a_file_given_twice_is_refused(converter, tmp_path, dst):
    """The second would overwrite the first."""
    src = write_archive(tmp_path / 'twice.tar', members())
    with tarfile.open(src, 'a') as archive:
        info = tarfile.TarInfo(IMAGE)
        info.size = len(picture(9))
        archive.addfile(info, io.BytesIO(picture(9)))
    with pytest.raises(converter.ConversionError, match='File exists'):
        converter.convert(src, str(dst))
    assert not dst.exists()


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_pipes_are_refused(converter, tmp_path, dst, kind):
    src = tmp_path / 'link.tar'
    with tarfile.open(src, 'w') as archive:
        info = tarfile.TarInfo(IMAGE)
        info.type, info.linkname = kind, '/etc/hostname'
        archive.addfile(info)
    with pytest.raises(converter.ConversionError, match='which CamVid does not'):
        converter.convert(str(src), str(dst))
    assert not dst.exists()


@pytest.mark.parametrize(
    ('size', 'said'),
    [
        (0, 'could not be unpacked'),
        (100, 'could not be unpacked'),
        (10000, 'could not be unpacked'),
        # Between two files, which a reader takes for the end.
        (10240, 'is not complete'),
    ],
)
def test_truncated_archives_are_refused(converter, archive, tmp_path, dst, size, said):
    cut = tmp_path / 'cut.tar'
    cut.write_bytes(Path(archive).read_bytes()[:size])
    with pytest.raises(converter.ConversionError, match=said):
        converter.convert(str(cut), str(dst))
    assert not dst.exists()


def test_shares_of_the_pixels_are_printed(converter, archive, dst, capsys):
    converter.convert(archive, str(dst))
    capsys.readouterr()
    converter.print_shares(str(dst))
    rows = {
        cells[1].strip(): [float(cell) for cell in cells[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if len(cells := line.split('│')) == 6
    }
    assert list(rows) == [*converter.CLASSES, '(not labelled)']
    found = np.array(list(rows.values())).T
    # The label maps are numbered through all splits.
    numbers = dict(train=(0, 1, 2), val=(3,), test=(4, 5))
    for share, split in zip(found, COUNTS, strict=True):
        pixels = np.concatenate([labels(i).ravel() for i in numbers[split]])
        expected = 100 * np.bincount(pixels, minlength=12) / pixels.size
        np.testing.assert_allclose(share, expected, atol=0.0051)


def run(*args):
    script = Path(__file__).resolve().parents[2] / SCRIPT
    return subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, check=False
    )


def test_command_line_says_what_is_wrong(archive, tmp_path, dst):
    result = run(tmp_path / 'absent.tar', dst)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'absent.tar does not exist' in result.stderr
    # The real numbers of images.
    result = run(archive, dst)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'train has 3 images instead of 367, and 2 more' in result.stderr


@pytest.mark.slow
def test_the_whole_archive(shared_dir, dst):
    result = run(shared_dir / 'data' / 'camvid.tar', dst)
    assert result.returncode == 0, result.stderr
    assert '367 training, 101 validation and 233 test images' in result.stdout
    assert [len(list(dst.glob(f'*/{s}/*'))) for s in COUNTS] == [734, 202, 466]
    # Of all pixels of the test set, a quarter is road and 4 % are not labelled.
    rows = [line.split('│') for line in result.stdout.splitlines() if '│' in line]
    tests = {row[1].strip(): float(row[4]) for row in rows}
    assert tests['Road'] == 25.81 and tests['(not labelled)'] == 3.83
