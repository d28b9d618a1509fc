"""tools/deployment/export.py: files, figures and refusals."""

import builtins
import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
from mmpretrain.datasets import CustomDataset

from mdeq_mm import get_config
from mdeq_mm.apis.inference import load_images
from tests.helpers import ROOT, load_tool

DIGITS = 'configs/demo/mdeq_1xb64-30e_digits.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool('tools/deployment/export.py')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A config of a small model for digits, and images of digits."""
    path = tmp_path_factory.mktemp('export')
    config = path / 'small.py'
    backbone = dict(
        arch=dict(
            _delete_=True, channels=[8, 8], num_groups=4, expansion=1,
            downsample_times=1,
        ),
        eval_solver=dict(max_steps=4),
    )  # fmt: skip
    necks = [
        dict(
            type='MDEQFuseScales',
            in_channels=[8, 8],
            head_channels=[2, 2],
            out_channels=64,
        ),
        dict(type='GlobalAveragePooling'),
    ]
    config.write_text(
        f'_base_ = {str(ROOT / DIGITS)!r}\n'
        f'model = dict(backbone={backbone!r}, neck={necks!r})\n'
        'model.update(head=dict(in_channels=64))\n'
        f'data_root = {str(path / "nowhere")!r}\n'
        'test_dataloader = dict(dataset=dict(data_root=data_root))\n'
    )
    sklearn = pytest.importorskip('sklearn.datasets', reason='no scikit-learn')
    images = path / 'images'
    images.mkdir()
    for i, digit in enumerate(sklearn.load_digits().images[:3]):
        # scikit-learn's grey levels are 0 to 16.
        grey = (digit * 15.9375).astype(np.uint8)
        Image.fromarray(grey).save(images / f'{i}.png')
    return config, images


def needs_onnx():
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(
            name, reason=f'{name} is not installed: requirements/deployment.txt'
        )


def test_a_file_is_checked_on_real_digits_and_timed(
    tool, small, tmp_path, capsys, monkeypatch
):
    needs_onnx()
    out, figures = tmp_path / 'new' / 'digits.onnx', tmp_path / 'digits.json'
    options = ['--out', out, '--verify', small[1], '--residual', '--images', 2]
    options += ['--peer', 'none', '--runs', 2, '--json', figures]
    tool.main([str(x) for x in (small[0], *options)])
    printed = capsys.readouterr().out
    assert 'the weights are random' in printed
    assert f'compared on 2 images of {small[1]}' in ' '.join(printed.split())
    (result,) = json.loads(figures.read_text())
    assert result['check']['passed'] and result['file'] == str(out)
    assert result['check']['difference']['scores'] < 1e-6
    assert result['check']['same_labels'] == dict(scores=1)
    assert result['models']['small']['bytes'] == out.stat().st_size
    assert result['models']['small']['latency_ms'] > 0

    import onnx

    found = {e.key: e.value for e in onnx.load(out).metadata_props}
    assert (found['solver'], found['steps']) == ('anderson', '4')
    assert (found['mean'], found['std']) == ('[77.8]', '[95.9]')
    assert (found['channel_order'], found['tolerance']) == ('grey', '0.001')
    assert found['outputs'] == '["scores", "residual"]'

    # What differs stays, under a name that says so: here the bias of one class.
    wrong = onnx.load(out)
    (bias,) = (t for t in wrong.graph.initializer if t.name.endswith('head.fc.bias'))
    values = onnx.numpy_helper.to_array(bias) + np.float32([0.01] + [0] * 9)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    monkeypatch.setattr(tool, 'to_onnx', lambda *_: wrong)
    other = tmp_path / 'other.onnx'
    with pytest.raises(SystemExit, match='differs from PyTorch by more'):
        tool.main([str(x) for x in (small[0], '--out', other, *options[2:])])
    assert not other.exists() and (tmp_path / 'other.unverified.onnx').exists()
    (result,) = json.loads(figures.read_text())
    assert not result['check']['passed']
    assert 1e-4 < result['check']['difference']['scores'] < 1e-2


def test_trained_weights_classify_the_test_images(tool, tmp_path):
    """The published model, as a device would run it: as accurate as in PyTorch."""
    needs_onnx()
    pytest.importorskip('sklearn', reason='scikit-learn is not installed')
    import onnxruntime

    root, out = tmp_path / 'digits', tmp_path / 'digits.onnx'
    load_tool('tools/dataset_converters/digits.py').write_digits(root)
    figures = tmp_path / 'figures.json'
    options = ['--out', out, '--steps', 20, '--residual', '--with-preprocessing']
    options += ['--images', 100, '--peer', 'none', '--runs', 0, '--json', figures]
    options += ['--cfg-options', f'test_dataloader.dataset.data_root={root}']
    tool.main([str(x) for x in ('mdeq-digits', *options)])
    (result,) = json.loads(figures.read_text())
    # The norm over the batch brings small differences between images up, and the
    # rounding of single precision with them.
    difference = result['check']['difference']
    assert all(d < 1e-4 for d in difference.values()), difference
    assert result['check']['same_labels'] == dict(scores=1)

    paths = sorted((root / 'test').glob('*/*.png'))
    images = load_images(get_config('mdeq-digits'), paths)['inputs']
    images = np.stack([image.numpy().astype(np.float32) for image in images])
    session = onnxruntime.InferenceSession(out)
    scores, residual = session.run(None, {'images': images})
    labels = np.array([int(p.parent.name) for p in paths])
    assert len(labels) == 599
    # README's 99.33 %: one image of 599 is .17 %.
    assert 100 * (scores.argmax(1) == labels).mean() == pytest.approx(99.33, abs=0.2)
    assert np.median(residual) < 1e-3


def test_several_sizes_of_programs_beside_a_peer(tool, small, tmp_path, capsys):
    out = tmp_path / 'digits.pt2'
    options = ['--out', out, '--steps', 1, '--solver', 'picard', '--peer', small[0]]
    options += ['--size', 12, 15, '--size', 8, 8, '--runs', 1, '--batch', 3]
    tool.main([str(x) for x in (small[0], *options)])
    assert {p.name for p in tmp_path.iterdir()} == {
        'digits_12x15.pt2', 'digits_8x8.pt2',
    }  # fmt: skip
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'compared on 4 random images, for no test set is there' in printed
    assert '12x15 pixels, batch 3, torch.export' in printed


def test_the_size_and_classes_come_from_the_config(tool):
    about, images = sys.modules['exporting.about'], sys.modules['exporting.images']
    cfg = tool.read_config(str(ROOT / DIGITS))
    assert images.size_of(cfg) == (32, 32)
    cfg = tool.read_config(str(ROOT / 'configs/imagenet/mdeq-small_4xb32-100e_in1k.py'))
    assert images.size_of(cfg) == (224, 224)
    cfg = tool.read_config(str(ROOT / 'configs/cifar10/mdeq-tiny_2xb64-50e_cifar10.py'))

    class Model:
        dataset_meta = {}
        head = type('Head', (), dict(num_classes=10))

    assert about.classes_of(cfg, Model)[:2] == ['airplane', 'automobile']
    Model.dataset_meta = dict(classes=list('abcdefghij'))
    assert about.classes_of(cfg, Model)[:2] == ['a', 'b']
    Model.head.num_classes = 11
    assert about.classes_of(cfg, Model) is None
    # A type as a config in Python has it.
    cfg.test_dataloader.dataset.type = CustomDataset
    assert images.dataset_class(cfg) is CustomDataset


def failing(tool, capsys, *options):
    """What a call that fails says."""
    with pytest.raises(SystemExit) as caught:
        tool.main([str(x) for x in options])
    code = caught.value.code
    return capsys.readouterr().err if code == 2 else code


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--out', 'x.pth'], 'ends in neither .onnx nor .pt2'),
        (['--out', 'x.pt2', '--format', 'onnx'], 'does not end in .onnx'),
        (['--out', 'x.pt2', '--opset', 18], '--opset is of ONNX files'),
        (['--out', 'x.pt2', '--unroll'], '--unroll is of ONNX files'),
        (['--out', 'x.onnx', '--steps', 0], '--steps is 0; it has to be at least 1'),
        (['--out', 'x.onnx', '--batch', -1], '--batch is -1'),
        (['--out', 'x.onnx', '--verify', 'nowhere'], "'nowhere' of --verify does not"),
        (['--out', 'x.onnx', '--size', 0, 5], 'both have to be at least 1'),
    ],
    ids=lambda x: ' '.join(map(str, x)) if isinstance(x, list) else '',
)
def test_options_that_do_not_fit(tool, capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in failing(tool, capsys, ROOT / DIGITS, *options)


def test_a_file_that_is_there_is_not_replaced(tool, capsys, tmp_path):
    out = tmp_path / 'there.onnx'
    out.touch()
    said = failing(tool, capsys, ROOT / DIGITS, '--out', out)
    assert f'{out} is there already' in said and '--overwrite' in said


def test_a_wrong_opset(tool, small, capsys, tmp_path):
    needs_onnx()
    options = ('--out', tmp_path / 'x.onnx', '--opset', 9)
    said = failing(tool, capsys, small[0], *options)
    assert 'opset=9 cannot be written: use 18 to' in said


def test_packages_that_are_missing(tool, small, capsys, tmp_path, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == 'onnx':
            raise ModuleNotFoundError("No module named 'onnx'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    said = failing(tool, capsys, small[0], '--out', tmp_path / 'x.onnx')
    assert 'pip install -r requirements/deployment.txt' in said


def test_broyden_is_replaced_with_a_sentence(tool, small, tmp_path, capsys):
    options = ['--out', tmp_path / 'x.pt2', '--steps', 1, '--peer', 'none', '--runs', 0]
    solver = ['--cfg-options', 'model.backbone.eval_solver.type=BroydenSolver']
    solver += ['model.backbone.eval_solver.memory=4']
    tool.main([str(x) for x in (small[0], *options, *solver)])
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'BroydenSolver is replaced by Anderson acceleration' in printed
    assert (tmp_path / 'x.pt2').exists()
