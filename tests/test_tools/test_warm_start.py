"""tools/analysis_tools/warm_start.py: sequences, figures and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

from tests.helpers import load_tool, write_project_classifier


@pytest.fixture(scope='module')
def tool():
    return load_tool('tools/analysis_tools/warm_start.py')


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """A contractive classifier, its config, and frames of two sequences."""
    folder = tmp_path_factory.mktemp('warm')
    config, checkpoint = write_project_classifier(folder, 1e-4)
    frames = folder / 'frames'
    frames.mkdir()
    rng = np.random.default_rng(0)
    # Sequence a changes little from frame to frame, in b each is an image of its own.
    still = rng.integers(0, 200, (30, 24, 3))
    for i in (1, 2, 9, 10):
        moving = still + rng.integers(0, 3, still.shape)
        Image.fromarray(moving.astype(np.uint8)).save(frames / f'a_{i}.png')
    for i in range(2):
        other = rng.integers(0, 255, still.shape).astype(np.uint8)
        Image.fromarray(other).save(frames / f'b_{i}.png')
    (frames / 'notes.txt').write_text('not an image')
    return config, checkpoint, frames


def test_sequences_in_natural_order(tool, case):
    found = tool.sequences(case[2])
    assert {k: [p.name for p in v] for k, v in found.items()} == dict(
        a=['a_1.png', 'a_2.png', 'a_9.png', 'a_10.png'], b=['b_0.png', 'b_1.png']
    )
    assert [p.name for p in tool.sequences(case[2], 2)['a']] == ['a_1.png', 'a_2.png']


def test_names_that_are_numbers_alone(tool, tmp_path):
    for name in ('10.jpg', '9.JPG', '0001TP_6.png'):
        (tmp_path / name).touch()
    found = tool.sequences(tmp_path)
    assert [p.name for p in found[tmp_path.name]] == ['9.JPG', '10.jpg']


def test_a_still_scene_takes_fewer_evaluations(tool, case, tmp_path, capsys):
    out = tmp_path / 'found.json'
    tool.main([*map(str, case), '--device', 'cpu', '--json', str(out)])
    printed = capsys.readouterr().out
    assert 'tolerance 0.0001, at most 30 evaluations' in printed
    rows = json.loads(out.read_text())
    assert {k: v['frames'] for k, v in rows.items()} == dict(a=4, b=2, all=6)
    zero, warm = (rows['a'][way]['evaluations'] for way in tool.WAYS)
    # The first of the four starts from zero both ways.
    assert 4 < zero < 30 and warm < 0.75 * zero
    for row in rows.values():
        assert row['same'] == 1
        assert all(0 < row[way]['residual'] <= 1e-4 for way in tool.WAYS)
    sums = [rows[k][tool.WAYS[1]]['evaluations'] * rows[k]['frames'] for k in rows]
    assert sums[0] + sums[1] == pytest.approx(sums[2])


def test_frames_of_another_sequence_do_not_matter(tool, case, tmp_path):
    """Each sequence starts from zero: alone it gives the same counts."""
    rows = []
    for name in ('', 'b_*'):
        folder = case[2]
        if name:
            folder = tmp_path / 'b'
            folder.mkdir()
            for path in Path(case[2]).glob(name):
                (folder / path.name).write_bytes(path.read_bytes())
        out = tmp_path / 'found.json'
        tool.main([*map(str, case[:2]), str(folder), '--device', 'cpu', '--json',
                   str(out)])  # fmt: skip
        rows.append(json.loads(out.read_text())['b'])
    assert rows[0]['warm']['evaluations'] == rows[1]['warm']['evaluations']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--tol', '0'], 'has to be above 0'),
        (['--max-steps', '0'], '--max-steps is 0'),
        (['--limit', '0'], '--limit is 0'),
    ],
)
def test_bad_options_are_refused(tool, case, arguments, words, capsys):
    with pytest.raises(SystemExit):
        tool.main([*map(str, case), *arguments])
    assert words in capsys.readouterr().err


def test_folders_without_frames_are_refused(tool, case, tmp_path):
    for folder, words in ((tmp_path, 'has no images'), (tmp_path / 'x', 'not exist')):
        with pytest.raises(SystemExit, match=words):
            tool.main([*map(str, case[:2]), str(folder)])


def test_frames_of_other_sizes_start_anew(tool, case, tmp_path, capsys):
    """Though they belong to one sequence, as of a camera that was turned."""
    folder = tmp_path / 'turned'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(30, 24), (24, 30), (24, 30), (32, 40)]):
        image = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / f'a_{i}.png')
    out = tmp_path / 'found.json'
    tool.main([*map(str, case[:2]), str(folder), '--device', 'cpu', '--json', str(out)])
    assert json.loads(out.read_text())['a']['frames'] == 4


def test_nothing_stays_on_the_layer(tool):
    layer = torch.nn.Identity()
    with tool.Counter(layer):
        assert len(layer._forward_hooks) == 1
    assert not layer._forward_hooks
