"""tools/demo/image_demo.py: what it prints, draws and refuses."""

import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger

from mdeq_mm.apis.inference import load_image, load_model
from tests.helpers import ROOT, load_tool, write_project_classifier

SCENES = str(ROOT / 'configs/demo/mdeq_1xb16-12e_digit-scenes-64x64.py')
TOOL = 'tools/demo/image_demo.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Three images of one size, one of another, in a folder with other things."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for name, size in (('1', 32), ('2', 32), ('3', 40), ('10', 32)):
        pixels = rng.integers(0, 255, (size, 32, 3), np.uint8)
        assert cv2.imwrite(str(folder / f'{name}.png'), pixels)
    (folder / 'notes.txt').write_text('not an image')
    return folder


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """Config and checkpoint of a contractive classifier."""
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    folder = tmp_path_factory.mktemp('classifier')
    meta = dict(dataset_meta=dict(classes=('ant', 'bee', 'cat', 'dog')))
    config, checkpoint = write_project_classifier(folder, 1e-3, meta=meta)
    return str(config), str(checkpoint)


def predictions(classifier, paths):
    """What the model says, one image at a time."""
    from mmengine.config import Config

    cfg = Config.fromfile(classifier[0])
    model = load_model(cfg, classifier[1], 'cpu')
    with torch.no_grad():
        return [model.test_step(load_image(cfg, path))[0] for path in paths]


@pytest.mark.parametrize('size', ['1', '2', '4'])
def test_labels_and_scores(tool, classifier, images, size, capsys):
    """The same in batches of any size, in natural order."""
    tool.main([str(images), *classifier, '--device', 'cpu', '--batch-size', size])
    lines = capsys.readouterr().out.strip().splitlines()
    # The toolboxes may say something when they are imported.
    lines = [line for line in lines if 'residual' in line]
    paths = [images / f'{name}.png' for name in (1, 2, 3, 10)]
    assert len(lines) == 4
    for line, path, sample in zip(
        lines, paths, predictions(classifier, paths), strict=True
    ):
        name = ('ant', 'bee', 'cat', 'dog')[int(sample.pred_label)]
        share = 100 * float(sample.pred_score.max())
        assert line.startswith(f'{path}: {name} {share:.1f} %; residual ')
        steps = int(re.search(r'(\d+) evaluations, converged', line)[1])
        assert 4 < steps < 30 and float(line.split('residual ')[1][:7]) <= 1e-3
    # Nothing is written where no folder is named.
    assert sorted(p.suffix for p in images.iterdir()) == ['.png'] * 4 + ['.txt']


def test_settings_of_the_solver_are_taken(tool, classifier, images, capsys):
    image = str(images / '1.png')
    options = ['--max-steps', '3', '--tol', '0', '--device', 'cpu']
    tool.main([image, *classifier, *options])
    assert '3 evaluations, max steps' in capsys.readouterr().out
    tool.main([image, *classifier, '--tol', '0.5', '--device', 'cpu'])
    assert re.search(r'[12] evaluations, converged', capsys.readouterr().out)


def test_pictures_of_a_classifier(tool, classifier, images, tmp_path, capsys):
    out = tmp_path / 'new' / 'pictures'
    tool.main([str(images), *classifier, '--out-dir', str(out), '--device', 'cpu'])
    assert f'4 pictures in {out}' in capsys.readouterr().out
    assert len(list(out.iterdir())) == 4
    picture, image = cv2.imread(str(out / '2.png')), cv2.imread(str(images / '2.png'))
    # Enlarged tenfold, two lines of text below.
    assert picture.shape == (320 + 2 * 16, 320, 3)
    np.testing.assert_array_equal(picture[5:320:10, 5::10], image)
    for line in (picture[320:336], picture[336:]):
        assert (line == 255).mean() > 0.6 and (line < 100).any()


def test_pictures_of_a_segmentation(tool, images, tmp_path, capsys):
    """Colours of the palette are mixed with the image, opaque ones replace it."""
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    from mmengine.config import Config

    cfg = Config.fromfile(SCENES)
    torch.manual_seed(3)
    model = load_model(cfg, device='cpu')
    checkpoint = tmp_path / 'model.pth'
    meta = dict(dataset_meta=cfg.metainfo.to_dict())
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    image = images / '1.png'
    with torch.no_grad():
        (sample,) = model.test_step(load_image(cfg, image))
    labels = sample.pred_sem_seg.data[0].numpy()
    colours = np.array(cfg.metainfo['palette'], np.uint8)[labels][..., ::-1]
    pixels = cv2.imread(str(image)).astype(float)
    for opacity in (1.0, 0.25):
        tool.main([str(image), SCENES, str(checkpoint), '--out-dir', str(tmp_path),
                   '--opacity', str(opacity), '--device', 'cpu'])  # fmt: skip
        line, shown = capsys.readouterr().out.strip().splitlines()[-2:]
        assert shown == str(tmp_path / '1.png')
        most = np.bincount(labels.flatten()).argmax()
        share = 100 * (labels == most).mean()
        name = cfg.metainfo['classes'][most]
        assert line.startswith(f'{image}: {name} {share:.0f} %')
        picture = cv2.imread(shown)
        assert picture.shape == (320 + 16, 320, 3)
        expected = (1 - opacity) * pixels + opacity * colours
        found = picture[5:320:10, 5::10]
        # Names of classes lie above some of the pixels.
        close = (np.abs(found - expected) <= 2).all(2)
        assert close.mean() > 0.5


def test_without_a_checkpoint_weights_are_random(tool, classifier, images, capsys):
    tool.main([str(images / '1.png'), classifier[0], '--device', 'cpu'])
    said = capsys.readouterr()
    assert 'the weights are random' in said.err
    assert re.search(r'1\.png: .* %; residual', said.out)


def test_a_named_model_with_a_checkpoint(tool, images, tmp_path, capsys):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    from mdeq_mm.apis import get_model

    checkpoint = tmp_path / 'model.pth'
    state = get_model('mdeq-digits', device='cpu').state_dict()
    torch.save(dict(state_dict=state), checkpoint)
    arguments = (images / '1.png', 'mdeq-digits', checkpoint, '--device', 'cpu')
    tool.main([*map(str, arguments), '--max-steps', '3', '--tol', '0'])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r'1\.png: (class )?\d \d+\.\d %; .* 3 evaluations', line)


def test_options_reach_the_published_weights(tool, images, capsys):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    option = 'model.backbone.eval_solver.max_steps=2'
    # The last logger of other tests may write where theirs was captured.
    MMLogger.get_instance('of this test')
    tool.main([str(images / '1.png'), 'mdeq-digits', '--device', 'cpu',
               '--cfg-options', option])  # fmt: skip
    said = capsys.readouterr()
    assert '2 evaluations' in said.out and not said.err


def test_options_of_the_config_are_taken(tool, classifier, images, capsys):
    options = [
        'model.backbone.eval_solver.max_steps=2',
        'model.backbone.warm_start=True',
    ]
    tool.main([str(images / '1.png'), *classifier, '--device', 'cpu', '--cfg-options',
               *options])  # fmt: skip
    assert '2 evaluations' in capsys.readouterr().out


def test_a_model_without_an_equilibrium(tool, images, tmp_path, capsys):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    config = str(ROOT / 'configs/demo/resnet_1xb64-30e_digits.py')
    image = str(images / '1.png')
    tool.main([image, config, '--device', 'cpu', '--out-dir', str(tmp_path)])
    assert 'residual' not in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / '1.png')).shape == (320 + 16, 320, 3)
    with pytest.raises(SystemExit, match='ImageClassifier has no equilibrium'):
        tool.main([image, config, '--device', 'cpu', '--max-steps', '4'])


def test_images_are_never_replaced(tool, classifier, images):
    before = (images / '1.png').read_bytes()
    with pytest.raises(SystemExit, match=r'would replace the image .*1\.png'):
        tool.main([str(images), *classifier, '--out-dir', str(images)])
    assert (images / '1.png').read_bytes() == before


def test_images_of_one_stem_have_a_picture_each(tool, tmp_path):
    paths = [tmp_path / name for name in ('a.png', 'a.jpg', 'b.jpg')]
    found = tool.picture_paths(paths, tmp_path / 'out')
    assert [path.name for path in found] == ['a.png.png', 'a.jpg.png', 'b.png']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--tol', '-1'], '--tol is -1.0; it has to be 0 or more'),
        (['--tol', 'nan'], '--tol is nan'),
        (['--max-steps', '0'], '--max-steps is 0; it has to be at least 1'),
        (['--batch-size', '0'], '--batch-size is 0'),
        (['--opacity', '0'], '--opacity is 0.0'),
        (['--device', 'abacus'], "--device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_refused(tool, classifier, images, arguments, words, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(images), *classifier, *arguments])
    assert words in capsys.readouterr().err


def test_bad_files_are_refused(tool, classifier, images, tmp_path, monkeypatch):
    """Before any model is built, but for what is in the files."""
    config, checkpoint = classifier
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.png').write_text('no image')
    plain = tmp_path / 'plain.py'
    plain.write_text("default_scope = 'mmpretrain'\nmodel = dict()\n")
    (tmp_path / 'other.py').write_text('model = dict()\n')
    text = str(tmp_path / 'text.png')
    with pytest.raises(SystemExit, match=r'the image .*text\.png.* cannot be read'):
        tool.main([text, config, checkpoint, '--device', 'cpu'])
    with pytest.raises(SystemExit, match='cannot be read as a checkpoint'):
        tool.main([str(images), config, text, '--device', 'cpu'])
    monkeypatch.setattr(tool, 'build_model', None)
    images = str(images)
    for arguments, words in (
        ([str(tmp_path / 'absent'), config], 'absent.* does not exist'),
        ([str(tmp_path / 'empty'), config], 'empty.* has no images'),
        (
            [images, str(tmp_path / 'absent.py')],
            r'config .*absent\.py.* does not exist',
        ),
        (
            [images, 'mdeq-digit'],
            'not exist. Did you mean mdeq-digit-sc.* or mdeq-digits',
        ),
        ([images, config, str(tmp_path / 'absent.pth')], r'absent\.pth.* not exist'),
        ([images, str(plain)], 'has no test_dataloader'),
        ([images, 'mdeq-joint_1xb16-12e_digits'], 'is of joint training'),
        ([images, str(tmp_path / 'other.py')], 'is of neither toolbox'),
    ):
        with pytest.raises(SystemExit, match=words):
            tool.main(arguments)
