"""tools/demo/video_demo.py: frames and videos, warm and cold, and what is refused."""

import re

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

from tests.helpers import ROOT, load_tool, write_project_classifier

TOOL = 'tools/demo/video_demo.py'
SUMMARY = re.compile(
    r'(\d+) frames?, (warm|from zero): (\S+) evaluations a frame, '
    r'median residual (\S+), (\S+) frames a second'
)


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Config and checkpoint of a contractive classifier."""
    folder = tmp_path_factory.mktemp('classifier')
    meta = dict(dataset_meta=dict(classes=('ant', 'bee', 'cat', 'dog')))
    config, checkpoint = write_project_classifier(folder, 1e-3, meta=meta)
    return [str(config), str(checkpoint), '--device', 'cpu']


@pytest.fixture(scope='module')
def frames(tmp_path_factory):
    """Sequence a, which changes little from frame to frame, and one frame of b."""
    folder = tmp_path_factory.mktemp('input') / 'frames'
    folder.mkdir()
    rng = np.random.default_rng(0)
    still = rng.integers(0, 200, (24, 32, 3))
    for i in (1, 2, 9, 10, 11):
        moving = (still + rng.integers(0, 3, still.shape)).astype(np.uint8)
        assert cv2.imwrite(str(folder / f'a_{i}.png'), moving)
    other = rng.integers(0, 255, still.shape).astype(np.uint8)
    assert cv2.imwrite(str(folder / 'b_1.png'), other)
    return folder


@pytest.fixture(scope='module')
def video(tmp_path_factory):
    """Six frames of 64x48 pixels in which a square moves, 12 a second."""
    path = tmp_path_factory.mktemp('video') / 'square.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (64, 48))
    assert writer.isOpened()
    for i in range(6):
        frame = np.full((48, 64, 3), 90, np.uint8)
        frame[10:30, 4 * i : 4 * i + 20] = (40, 160, 220)
        writer.write(frame)
    writer.release()
    return path


def run(tool, capsys, *arguments):
    """Run the tool, and take its summary apart."""
    tool.main(list(map(str, arguments)))
    found = SUMMARY.search(capsys.readouterr().out)
    count, start, steps, residual, fps = found.groups()
    assert float(fps) > 0
    return int(count), start, float(steps), float(residual)


def read(path):
    """Frames of a video, and how many are shown a second."""
    capture = cv2.VideoCapture(str(path))
    assert capture.isOpened()
    found = []
    while True:
        there, frame = capture.read()
        if not there:
            return found, capture.get(cv2.CAP_PROP_FPS)
        found.append(frame)


def test_a_warm_start_spares_evaluations(tool, model, frames, tmp_path, capsys):
    warm = run(tool, capsys, frames, *model, '--out', tmp_path / 'warm')
    cold = run(tool, capsys, frames, *model, '--out', tmp_path / 'cold', '--cold')
    assert warm[:2] == (6, 'warm') and cold[:2] == (6, 'from zero')
    # Two of the six are the first ones of their sequences.
    assert 4 < warm[2] < 0.8 * cold[2] < 24
    assert 0 < warm[3] <= 1e-3 and 0 < cold[3] <= 1e-3


def test_sequences_begin_from_zero(tool, model, frames, tmp_path, capsys):
    """The only frame of b costs what it costs alone."""
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'b_1.png').write_bytes((frames / 'b_1.png').read_bytes())
    (tmp_path / 'a').mkdir()
    for path in frames.glob('a_*.png'):
        (tmp_path / 'a' / path.name).write_bytes(path.read_bytes())
    counts = []
    for name in ('a', 'b'):
        count, _, steps, _ = run(
            tool, capsys, tmp_path / name, *model, '--out', tmp_path / f'out_{name}'
        )
        counts.append(count * steps)
    count, _, steps, _ = run(tool, capsys, frames, *model, '--out', tmp_path / 'both')
    assert count * steps == pytest.approx(sum(counts), abs=0.6)


def test_frames_of_a_folder(tool, model, frames, tmp_path, capsys):
    out = tmp_path / 'new' / 'pictures'
    run(tool, capsys, frames, *model, '--out', out, '--max-steps', '3', '--tol', '0')
    names = {path.name for path in frames.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    picture, image = (
        cv2.imread(str(out / 'a_9.png')),
        cv2.imread(str(frames / 'a_9.png')),
    )
    assert picture.shape == (240 + 2 * 16, 320, 3)
    np.testing.assert_array_equal(picture[5:240:10, 5::10], image)


@pytest.mark.parametrize('suffix', ['.avi', '.mp4', '.MKV'])
def test_a_video(tool, model, video, tmp_path, suffix, capsys):
    out = tmp_path / f'out{suffix}'
    count, start, steps, _ = run(
        tool, capsys, video, *model, '--out', out, '--max-steps', '4', '--tol', '0'
    )
    assert (count, start, steps) == (6, 'warm', 4)
    pictures, fps = read(out)
    assert len(pictures) == 6 and fps == pytest.approx(12, abs=0.01)
    originals, _ = read(video)
    for picture, original in zip(pictures, originals, strict=True):
        assert picture.shape == (240 + 2 * 16, 320, 3)
        # Up to what is lost by compression.
        difference = picture[2:240:5, 2::5].astype(float) - original
        assert np.abs(difference).mean() < 6
        assert (picture[240:] > 200).mean() > 0.6
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_frames_of_a_video(tool, model, video, tmp_path, capsys):
    out = tmp_path / 'pictures'
    count, *_ = run(tool, capsys, video, *model, '--out', out, '--limit', '2')
    assert count == 2
    names = sorted(path.name for path in out.iterdir())
    assert names == ['000000.png', '000001.png']


def test_a_folder_becomes_a_video(tool, model, frames, tmp_path, capsys):
    out = tmp_path / 'out.avi'
    run(tool, capsys, frames, *model, '--out', out, '--fps', '5', '--max-steps', '1')
    pictures, fps = read(out)
    assert len(pictures) == 6 and fps == pytest.approx(5)


def test_a_segmentation_is_painted_without_names(tool, frames, tmp_path, capsys):
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    from mmengine.config import Config

    config = str(ROOT / 'configs/demo/mdeq_1xb16-12e_digit-scenes-64x64.py')
    out = tmp_path / 'out'
    count, _, steps, residual = run(
        tool, capsys, frames, config, '--device', 'cpu', '--out', out, '--limit', '2',
        '--opacity', '1', '--max-steps', '3',
    )  # fmt: skip
    assert (count, steps) == (2, 3) and residual > 0.01
    picture = cv2.imread(str(out / 'a_1.png'))
    assert picture.shape == (240 + 16, 320, 3)
    palette = Config.fromfile(config).metainfo['palette']
    found = np.unique(picture[:240].reshape(-1, 3), axis=0)[:, ::-1].tolist()
    assert len(found) > 1 and all(colour in palette for colour in found)


def test_nothing_on_disk_is_lost(tool, model, frames, video, tmp_path, capsys):
    there = tmp_path / 'out.avi'
    there.write_text('precious')
    folder = tmp_path / 'pictures'
    folder.mkdir()
    (folder / 'notes.txt').write_text('precious')
    limit = ['--limit', '1', '--max-steps', '1']
    for source, out, words in (
        (frames, there, 'exists: give another place, or --overwrite'),
        (frames, folder, 'is a folder with something in it: give'),
        (frames, frames, 'is the input itself'),
        (video, video, 'is the input itself'),
        (frames, folder / 'notes', 'is a file'),
    ):
        if words == 'is a file':
            out.write_text('precious')
        before = sorted(p.name for p in (tmp_path, folder, frames) for p in p.iterdir())
        again = ['--overwrite'] if 'itself' in words or words == 'is a file' else []
        with pytest.raises(SystemExit, match=words):
            tool.main([*map(str, (source, *model, '--out', out)), *again])
        assert before == sorted(
            p.name for p in (tmp_path, folder, frames) for p in p.iterdir()
        )
    assert there.read_text() == 'precious'
    for out in (there, folder):
        run(tool, capsys, frames, *model, '--out', out, '--overwrite', *limit)
    assert len(read(there)[0]) == 1
    assert (folder / 'notes.txt').read_text() == 'precious'
    assert (folder / 'a_1.png').exists()


def test_a_run_that_fails_leaves_the_video_that_was_there(tool, model, tmp_path):
    """Frames of two sizes do not fit one video."""
    folder = tmp_path / 'frames'
    folder.mkdir()
    for i, size in enumerate((32, 40)):
        cv2.imwrite(str(folder / f'{i}.png'), np.full((size, 32, 3), 9, np.uint8))
    out = tmp_path / 'out.avi'
    out.write_text('precious')
    with pytest.raises(SystemExit, match="frame '1' makes a picture of 320x432 pixels"):
        tool.main([*map(str, (folder, *model, '--out', out)), '--overwrite'])
    assert out.read_text() == 'precious'
    assert {path.name for path in tmp_path.iterdir()} == {'frames', 'out.avi'}


def test_what_is_done_is_kept_on_an_interrupt(tool, model, frames, tmp_path, capsys,
                                              monkeypatch):  # fmt: skip
    predict, calls = tool.predict, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(tool, 'predict', interrupted)
    out = tmp_path / 'out.avi'
    count, *_ = run(tool, capsys, frames, *model, '--out', out)
    assert count == 3 and len(read(out)[0]) == 3


def test_a_model_without_an_equilibrium(tool, frames, tmp_path, capsys):
    config = str(ROOT / 'configs/demo/resnet_1xb64-30e_digits.py')
    out = tmp_path / 'out'
    tool.main(
        [*map(str, (frames, config, '--out', out, '--limit', 2)), '--device', 'cpu']
    )
    assert re.search(r'2 frames, \S+ frames a second', capsys.readouterr().out)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--limit', '0'], '--limit is 0; it has to be at least 1'),
        (['--fps', '0'], '--fps is 0.0; it has to be above 0'),
        (['--tol', 'inf'], '--tol is inf'),
        (['--out', 'out.gif'], 'is no folder, and no video of a known kind'),
    ],
)
def test_bad_options_are_refused(tool, model, frames, arguments, words, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(frames), *model, '--out', 'out', *arguments])
    assert words in capsys.readouterr().err


def test_inputs_that_are_no_videos(tool, model, frames, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'build_model', None)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.mp4').write_text('no video')
    for source, words in (
        (tmp_path / 'absent.mp4', r'absent\.mp4.* does not exist'),
        (tmp_path / 'empty', 'empty.* has no images'),
        (tmp_path / 'text.mp4', r'text\.mp4.* cannot be opened'),
        (frames / 'a_1.png', r'a_1\.png.* cannot be opened: .* a folder of frames'),
    ):
        with pytest.raises(SystemExit, match=words):
            tool.main([str(source), *model, '--out', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()
