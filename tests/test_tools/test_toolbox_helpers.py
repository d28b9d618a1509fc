"""The toolboxes' own helper tools on configs and files of this project, and ours."""

import json
import os.path as osp
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
pytest.importorskip('mmseg', reason='mmseg is not installed')

from mdeq_mm.apis.inference import load_model
from tests.helpers import load_tool
from tests.test_tools.test_train_test import write_mmseg_config

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / 'configs/demo/mdeq_1xb64-30e_digits.py'
RESNET = ROOT / 'configs/demo/resnet_1xb64-30e_digits.py'
SCENES = ROOT / 'configs/demo/mdeq_1xb16-12e_digit-scenes-64x64.py'
JOINT = ROOT / 'configs/demo/mdeq-joint_1xb16-12e_digits.py'
#: Upper left corner of the bright square of each class.
BRIGHT = dict(zero=(0, 0), one=(5, 5))


def refused(tool, capsys, *args):
    """Call a main function that has to end in one sentence; return it."""
    with pytest.raises(SystemExit) as stop:
        tool.main(list(map(str, args)))
    code = stop.value.code
    if code == 2:
        # argparse prints its usage, and the sentence in one line.
        code = capsys.readouterr().err.splitlines()[-1]
    assert '\n' not in code and ': error: ' in code
    return code


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Two classes of grey 8x8 images, each with a bright square at its own place."""
    root = tmp_path_factory.mktemp('digits')
    for split in ('train', 'test'):
        for name, (top, left) in BRIGHT.items():
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                image = np.zeros((8, 8), np.uint8)
                image[top : top + 3, left : left + 3] = 255
                Image.fromarray(image).save(root / split / name / f'{name}{i}.png')
    return root


@pytest.fixture(scope='module')
def mmseg_config(tmp_path_factory):
    return write_mmseg_config(tmp_path_factory.mktemp('seg'))


def save(config, path, classes):
    """Random weights with the names of classes, as a Runner saves them."""
    torch.manual_seed(0)
    model = load_model(Config.fromfile(config), device='cpu')
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def digits_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'digits.pth'
    return save(DIGITS, path, tuple('abcdefghij'))


@pytest.fixture(scope='module')
def library():
    return pytest.importorskip(
        'pytorch_grad_cam',
        reason='grad-cam is not installed (requirements/visualization.txt)',
    )


@pytest.fixture(scope='module')
def flops():
    return load_tool('tools/analysis_tools/get_flops.py')


@pytest.fixture(scope='module')
def browse():
    return load_tool('tools/misc/browse_dataset.py')


@pytest.fixture(scope='module')
def vis_cam():
    return load_tool('tools/analysis_tools/vis_cam.py')


class TestOfTheToolboxes:
    @pytest.fixture
    def call(self, monkeypatch, capsys):
        """Run a tool of mmpretrain as a program; return what it printed."""

        def run(path, *args):
            (root,) = find_spec('mmpretrain').submodule_search_locations
            path = f'{root}/.mim/tools/{path}'
            monkeypatch.syspath_prepend(osp.dirname(path))
            monkeypatch.setattr(sys, 'argv', [path, *map(str, args)])
            try:
                runpy.run_path(path, run_name='__main__')
            finally:
                # Modules beside a tool have names that others may have too.
                sys.modules.pop('utils', None)
            return capsys.readouterr().out

        return run

    def test_logs_with_the_equilibrium(self, call, tmp_path):
        log = tmp_path / 'scalars.json'
        lines = [
            dict(epoch=e, iter=i, step=6 * (e - 1) + i, lr=0.1, time=0.25 * e,
                 loss=1 / i, eq_residual=0.1 / i)
            for e in (1, 2) for i in (3, 6)
        ]  # fmt: skip
        log.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        tool = 'analysis_tools/analyze_logs.py'
        out = tmp_path / 'curves.png'
        call(tool, 'plot_curve', log, '--keys', 'eq_residual', 'loss', '--out',
                  out)  # fmt: skip
        assert cv2.imread(str(out)).std() > 1
        assert 'average iter time: 0.3750' in call(tool, 'cal_train_time', log)

    def test_schedule(self, call, tmp_path):
        out = tmp_path / 'lr.png'
        printed = call('visualization/vis_scheduler.py', DIGITS, '--dataset-size',
                            1198, '--not-show', '--save-path', out)  # fmt: skip
        assert 'Iterations per epoch: 18' in printed
        assert cv2.imread(str(out)).std() > 1

    def test_print_config(self, call):
        assert "type='MDEQPoolBranches'" in call('misc/print_config.py', DIGITS)

    def test_confusion_matrix(self, call, digits_checkpoint, tmp_path):
        for name in range(10):
            (tmp_path / f'test/{name}').mkdir(parents=True)
            image = Image.fromarray(np.full((8, 8), 25 * name, np.uint8))
            image.save(tmp_path / f'test/{name}/a.png')
        out = tmp_path / 'confusion.png'
        printed = call(
            'analysis_tools/confusion_matrix.py', DIGITS, digits_checkpoint,
            '--show-path', out, '--cfg-options',
            f'test_dataloader.dataset.data_root={tmp_path}', f'work_dir={tmp_path}',
        )  # fmt: skip
        rows = re.findall(r'\[\[?((?:\d+, *){9}\d+)\]', printed)
        assert [sum(map(int, row.split(','))) for row in rows] == [1] * 10
        assert out.exists()


class TestGetFlops:
    def count(self, flops, tmp_path, *args):
        out = tmp_path / 'flops.json'
        flops.main([*map(str, args), '--json', str(out)])
        found = json.loads(out.read_text())
        parts = {k: (v['parameters'], v['flops']) for k, v in found['parts'].items()}
        return found['size'], parts

    def test_of_a_classifier(self, flops, tmp_path, capsys):
        size, parts = self.count(flops, tmp_path, DIGITS)
        assert size == [1, 32, 32]
        assert list(parts) == [
            'stem and injection', 'one evaluation of f', '12 evaluations', 'neck',
            'head', 'whole',
        ]  # fmt: skip
        assert parts['one evaluation of f'][1] == 4_022_784
        assert parts['12 evaluations'] == (None, 12 * 4_022_784)
        # A matrix of 72 times 10, and its bias.
        assert parts['head'] == (730, 2 * 720)
        whole = parts.pop('whole')
        once = parts.pop('one evaluation of f')
        assert whole[0] == 95_986 == once[0] + sum(n or 0 for n, _ in parts.values())
        assert whole[1] == sum(flops for _, flops in parts.values())
        assert '4.02 M' in capsys.readouterr().out

    def test_agrees_with_the_model_zoo(self, flops):
        zoo = load_tool('dev/model_zoo.py')
        cfg = Config.fromfile(SCENES)
        size = (1, 48, 64)
        cost = zoo.measure(cfg, size)
        parts = flops.parts_of(load_model(cfg, device='cpu'), size)
        assert parts['whole'] == (cost.parameters, cost.flops)
        assert parts['one evaluation of f'][1] == cost.function
        # mmseg calls the forward of its heads themselves.
        rest = parts['stem and injection'][1] + parts['decode_head'][1]
        assert rest == cost.rest and parts['decode_head'][1] > 0

    def test_fewer_steps_and_another_size(self, flops, tmp_path):
        size, parts = self.count(flops, tmp_path, SCENES, '--shape', 32, 64,
                                 '--steps', 7)  # fmt: skip
        assert size == [1, 32, 64]
        function = parts['one evaluation of f'][1]
        assert parts['7 evaluations'][1] == 7 * function
        _, larger = self.count(flops, tmp_path, SCENES, '--shape', 64)
        assert larger['one evaluation of f'][1] == 2 * function

    def test_of_another_model(self, flops, tmp_path):
        size, parts = self.count(flops, tmp_path, RESNET)
        assert size == [1, 32, 32] and list(parts) == ['backbone', 'head', 'whole']
        assert parts['head'] == (490, 2 * 480)
        assert parts['whole'][0] == 99_748

    def test_of_joint_training(self, flops):
        cfg = Config.fromfile(JOINT)
        parts = flops.parts_of(load_model(cfg, device='cpu'), (1, 64, 64))
        assert {'neck', 'head', 'decode_head'} < set(parts)
        whole = parts.pop('whole')[1]
        once = parts.pop('one evaluation of f')[1]
        assert whole == sum(flops for _, flops in parts.values()) > 12 * once

    @pytest.mark.parametrize(
        'steps, size',
        [
            ([dict(type='RandomResizedCrop', scale=224)], (224, 224)),
            ([dict(type='RandomCrop', crop_size=(512, 1024))], (512, 1024)),
            # Limits of a random size, and a size that a crop follows.
            ([dict(type='RandomResize', scale=(240, 180))], None),
            # A width and a height, or only their limits.
            ([dict(type='Resize', scale=(40, 30))], (30, 40)),
            ([dict(type='Resize', scale=(40, 30), keep_ratio=True)], None),
            ([dict(type='Resize', scale=32), dict(type='RandomCrop', crop_size=28)],
             (28, 28)),
        ],
    )  # fmt: skip
    def test_size_of_the_training(self, flops, steps, size):
        dataset = dict(type='CustomDataset', pipeline=steps)
        wrapped = dict(type='RepeatDataset', times=2, dataset=dataset)
        for given in (dataset, wrapped):
            cfg = Config(dict(train_dataloader=dict(dataset=given)))
            assert flops.training_size(cfg) == size

    @pytest.mark.parametrize(
        'args, words',
        [
            (['nowhere.py'], "'nowhere.py' does not exist"),
            ([DIGITS, '--shape', 0], '--shape has 0'),
            ([DIGITS, '--shape', 1, 2, 3], 'has 3 numbers'),
            ([DIGITS, '--steps', 0], '--steps is 0'),
            ([SCENES], 'sets no size: give it with --shape HEIGHT WIDTH'),
            ([RESNET, '--steps', 3], '--steps is for models with an MDEQ'),
        ],
    )
    def test_refusals(self, flops, capsys, args, words):
        assert words in refused(flops, capsys, *args)


class TestBrowseDataset:
    def test_of_a_classifier(self, browse, digits, tmp_path):
        browse.main([str(DIGITS), '--output-dir', str(tmp_path), '--data-root',
                     str(digits), '--number', '3', '--phase', 'test'])  # fmt: skip
        names = sorted(p.name for p in tmp_path.iterdir())
        # Evenly from the four images.
        assert names == ['000000_one0.png', '000002_zero0.png', '000003_zero1.png']
        picture = cv2.imread(str(tmp_path / names[0]))
        assert picture.shape == (256, 2 * 256 + browse.GAP, 3)
        original, transformed = picture[:, :256], picture[:, -256:]
        assert (picture[:, 256:-256] == 255).all()
        # The bright square is below on the right, with hard edges in the file and
        # soft ones where the pipeline enlarged it.
        for part, soft in ((original, False), (transformed, True)):
            assert part[200:250, 200:250].mean() > 240
            assert part[100:150, 60:150].mean() < 5
            assert (np.ptp(part[200, 140:200]) > 0) and soft == bool(
                ((part[210, 130:210] > 60) & (part[210, 130:210] < 200)).sum() > 9
            )
        # The caption stands above on the left.
        assert original[:20, :100].std() > 20

    def test_the_seed_sets_the_augmentation(self, browse, digits, tmp_path):
        def picture(seed, name):
            out = tmp_path / name
            browse.main([str(DIGITS), '--output-dir', str(out), '--data-root',
                         str(digits), '--number', '1', '--mode', 'transformed',
                         '--seed', str(seed)])  # fmt: skip
            (path,) = out.iterdir()
            return cv2.imread(str(path))

        first = picture(0, 'a')
        assert (first == picture(0, 'b')).all()
        assert any((first != picture(i, f'c{i}')).any() for i in (1, 2, 3))

    def test_of_segmentation(self, browse, mmseg_config, tmp_path):
        browse.main([str(mmseg_config), '--output-dir', str(tmp_path), '--mode',
                     'original', '--number', '1', '--cfg-options',
                     'visualizer.alpha=1.0'])  # fmt: skip
        (path,) = tmp_path.iterdir()
        picture = cv2.imread(str(path))
        # 33x40 pixels, of which the right half, from the 20th on, is the second class.
        assert picture.shape == (8 * 33, 8 * 40, 3)
        left, right = picture[10:60, 10:60], picture[10:60, -60:-10]
        dataset = Config.fromfile(mmseg_config).train_dataloader.dataset
        for part, colour in zip((left, right), dataset.metainfo.palette, strict=True):
            # But for the names of the classes.
            assert (np.median(part, (0, 1))[::-1] == colour).all()

    def test_of_joint_training(self, browse, digits, tmp_path):
        (tmp_path / 'images/train').mkdir(parents=True)
        (tmp_path / 'annotations/train').mkdir(parents=True)
        grey = np.full((64, 64), 90, np.uint8)
        labels = np.zeros_like(grey)
        labels[:32] = 3
        Image.fromarray(grey).save(tmp_path / 'images/train/a.png')
        Image.fromarray(labels).save(tmp_path / 'annotations/train/a.png')
        out = tmp_path / 'out'
        data = 'train_dataloader.dataset.datasets'
        browse.main([str(JOINT), '--output-dir', str(out), '--number', '1',
                     '--cfg-options', f'{data}.cls.data_root={digits}',
                     f'{data}.seg.data_root={tmp_path}'])  # fmt: skip
        names = sorted(p.name for p in out.iterdir())
        assert names == ['cls_000000_one0.png', 'seg_000000_a.png']
        picture = cv2.imread(str(out / names[1]))[:, :256]
        # Green, the colour of the digit 2, over half of the grey.
        colour = np.array([44, 160, 44][::-1])
        found = picture[100:120, 10:60].mean((0, 1))
        assert np.abs(found - (colour + 90) / 2).max() < 3
        assert np.abs(picture[-60:-40, 10:60].mean((0, 1)) - 45).max() < 3

    @pytest.mark.parametrize('channels', [1, 3])
    def test_pixels(self, browse, channels):
        inputs = torch.arange(2 * 3 * channels, dtype=torch.uint8)
        inputs = inputs.view(channels, 2, 3)
        image = browse.pixels_of(inputs)
        assert image.shape == (2, 3, 3) and image.dtype == np.uint8
        red, blue = (2, 0) if channels == 3 else (0, 0)
        assert (image[..., 0] == inputs[red].numpy()).all()
        assert (image[..., 2] == inputs[blue].numpy()).all()
        scaled = browse.pixels_of(inputs.float() / inputs.max() - 0.5)
        assert (scaled.min(), scaled.max()) == (0, 255)

    @pytest.mark.parametrize(
        'args, words',
        [
            (['--number', 0], '--number is 0'),
            (['--data-root', '/nowhere'], "data_root is '/nowhere'"),
            (['--cfg-options', 'val_dataloader=None', '--phase', 'val'],
             'has no val_dataloader'),
        ],
    )  # fmt: skip
    def test_refusals(self, browse, capsys, tmp_path, args, words):
        assert words in refused(browse, capsys, DIGITS, '--output-dir', tmp_path, *args)

    def test_a_file_is_refused(self, browse, capsys, tmp_path):
        path = tmp_path / 'file'
        path.touch()
        assert 'is a file' in refused(browse, capsys, DIGITS, '--output-dir', path)

    def test_of_images_without_a_picture(self, browse):
        with pytest.raises(ValueError, match='several images a sample'):
            browse.pixels_of([torch.zeros(3, 2, 2)] * 2)
        with pytest.raises(ValueError, match='4 channels'):
            browse.pixels_of(torch.zeros(4, 2, 2))


class TestVisCam:
    @staticmethod
    def grad_cam(part, grad, size):
        """Grad-CAM of a map (1, C, h, w) by its definition, from 0 to 1."""
        weights = grad.mean((2, 3), keepdim=True)
        cam = (weights * part).sum(1)[0].relu().detach().numpy()
        # As grad-cam scales: to [0, 1], then in size.
        cam = (cam - cam.min()) / (1e-7 + (cam - cam.min()).max())
        cam = cv2.resize(cam, size[::-1])
        return (cam - cam.min()) / (1e-7 + (cam - cam.min()).max())

    def test_of_the_branches(self, vis_cam, library, digits_checkpoint):
        """Against Grad-CAM written out; no branch gets the gradient of another."""
        model = load_model(Config.fromfile(DIGITS), digits_checkpoint, 'cpu')
        torch.manual_seed(0)
        inputs = torch.rand(1, 1, 32, 32)
        layers = vis_cam.find_layers(model, ['backbone'])
        logits, outputs = vis_cam.outputs_of(model, inputs, layers)
        maps = [m.requires_grad_() for m in outputs['backbone']]
        (found,) = model.head(model.neck(tuple(maps)))
        assert torch.allclose(found, logits[0])
        grads = torch.autograd.grad(found[3], maps)
        model.requires_grad_(False)
        cams = vis_cam.cams_of(library.GradCAM, model, inputs, model.backbone,
                            outputs['backbone'], lambda out: out[3])  # fmt: skip
        assert len(cams) == 3
        for cam, part, grad in zip(cams, maps, grads, strict=True):
            expected = self.grad_cam(part, grad, (32, 32))
            assert np.abs(cam - expected).max() < 1e-3
            assert cam.max() > 0.99
        # The model is as before.
        assert 'forward' not in vars(model.backbone)

    def test_the_gradient_passes_through_the_equilibrium(
        self, vis_cam, library, digits_checkpoint
    ):
        model = load_model(Config.fromfile(DIGITS), digits_checkpoint, 'cpu')
        torch.manual_seed(0)
        inputs = torch.rand(1, 1, 32, 32)
        layers = vis_cam.find_layers(model, ['backbone.injection.0'])
        _, outputs = vis_cam.outputs_of(model, inputs, layers)
        injection = outputs['backbone.injection.0'].detach().requires_grad_()
        backbone = model.backbone
        with torch.no_grad():
            others = backbone.inject(inputs)[1:]
        maps = backbone.equilibrium(backbone._start(injection), injection, *others)
        (found,) = model.head(model.neck(backbone.outputs(maps)))
        (grad,) = torch.autograd.grad(found[3], injection)
        model.requires_grad_(False)
        (cam,) = vis_cam.cams_of(
            library.GradCAM, model, inputs, layers['backbone.injection.0'],
            outputs['backbone.injection.0'], lambda out: out[3],
        )  # fmt: skip
        assert np.abs(cam - self.grad_cam(injection, grad, (32, 32))).max() < 1e-3

    def test_picture_of_a_classifier(
        self, vis_cam, library, digits, digits_checkpoint, tmp_path, capsys
    ):
        out = tmp_path / 'a/cam.png'
        image = digits / 'test/one/one0.png'
        vis_cam.main([str(image), str(DIGITS), str(digits_checkpoint), '--category',
                      'c', '--out-file', str(out), '--device', 'cpu', '--method',
                      'LayerCAM', '--target-layers', 'backbone',
                      'backbone.injection.0'])  # fmt: skip
        assert capsys.readouterr().out.splitlines()[-1] == str(out)
        picture = cv2.imread(str(out))
        # The image, three branches, an injection and the mean in one row.
        assert picture.shape[1] > 5 * 0.75 * picture.shape[0]
        assert picture.std() > 20

    def test_picture_of_segmentation(self, vis_cam, library, mmseg_config, tmp_path):
        checkpoint = save(mmseg_config, tmp_path / 'seg.pth', ('dark', 'bright'))
        out = tmp_path / 'cam.png'
        image = mmseg_config.parent / 'images/test/0.jpg'
        vis_cam.main([str(image), str(mmseg_config), str(checkpoint), '--out-file',
                      str(out), '--device', 'cpu'])  # fmt: skip
        assert cv2.imread(str(out)).std() > 20

    def test_categories(self, vis_cam):
        logits = torch.tensor([[0.0, 2, 1]])
        assert vis_cam.find_category(logits, ['x', 'y', 'z']) == (1, None)
        assert vis_cam.find_category(logits, ['x', 'y', 'z'], 'z') == (2, None)
        # Names go before numbers.
        assert vis_cam.find_category(logits, ['2', '1', '0'], '2') == (0, None)
        assert vis_cam.find_category(logits, [], '2') == (2, None)
        with pytest.raises(ValueError, match=r"'w' is no class: .* one of x, y, z"):
            vis_cam.find_category(logits, ['x', 'y', 'z'], 'w')
        with pytest.raises(ValueError, match="'3' is no class: use a number below 3"):
            vis_cam.find_category(logits, [], '3')

    def test_categories_of_pixels(self, vis_cam):
        labels = torch.tensor([[0, 2, 2], [2, 2, 0]])
        logits = torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1)[None].float()
        category, mask = vis_cam.find_category(logits, ['x', 'y', 'z'])
        assert category == 2 and (mask == (labels == 2)).all()
        with pytest.raises(
            ValueError, match='no pixel is predicted as y, only as x, z'
        ):
            vis_cam.find_category(logits, ['x', 'y', 'z'], 'y')

    def test_layers(self, vis_cam):
        model = load_model(Config.fromfile(DIGITS), device='cpu')
        assert vis_cam.find_layers(model, ['neck']) == {'neck': model.neck}
        with pytest.raises(ValueError, match='did you mean backbone'):
            vis_cam.find_layers(model, ['backbones'])
        with pytest.raises(ValueError, match='lies inside f, which is evaluated many'):
            vis_cam.find_layers(model, ['backbone.equilibrium.f'])
        with pytest.raises(ValueError, match="'head' gives no maps"):
            vis_cam.outputs_of(model, torch.rand(1, 1, 32, 32), dict(head=model.head))

    def test_joint_models_are_refused(self, vis_cam):
        model = load_model(Config.fromfile(JOINT), device='cpu')
        with pytest.raises(ValueError, match='gives 2 results'):
            vis_cam.outputs_of(model, torch.rand(1, 1, 32, 32), {})

    def test_refusals(self, vis_cam, capsys, digits, digits_checkpoint, monkeypatch):
        image = digits / 'test/one/one0.png'
        for args, words in (
            ([image, DIGITS, 'nowhere.pth'], "'nowhere.pth' does not exist"),
            (['nowhere.png', DIGITS, digits_checkpoint], "'nowhere.png' does not"),
            ([image, 'nowhere.py', digits_checkpoint], "'nowhere.py' does not exist"),
        ):
            assert words in refused(vis_cam, capsys, *args)
        # As if it were not installed.
        monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
        said = refused(vis_cam, capsys, image, DIGITS, digits_checkpoint)
        assert 'requirements/visualization.txt' in said
