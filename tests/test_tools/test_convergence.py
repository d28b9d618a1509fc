"""tools/analysis_tools/convergence.py: figures, report and refusals."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from PIL import Image
from torch import nn

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')

from mdeq_mm.apis.inference import load_image, load_model
from mdeq_mm.implicit import EquilibriumLayer, StateSpec, Status
from tests.helpers import (
    load_tool,
    matrix,
    project_classifier,
    project_golden,
    segmentor_config,
)

STEPS, TOL = 16, 1e-4


@pytest.fixture(scope='module')
def tool():
    return load_tool('tools/analysis_tools/convergence.py')


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """A contractive classifier, its config, and ten images.

    Every third label is not the one that the model predicts.
    """
    folder = tmp_path_factory.mktemp('convergence')
    golden = project_golden()['config']
    solver = dict(type='AndersonSolver', max_steps=STEPS, tol=TOL)
    model = golden | dict(backbone=golden['backbone'] | dict(eval_solver=solver))
    config = folder / 'config.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        "custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)\n"
        f'model = {model!r}\n'
        'data_preprocessor = dict(mean=[127.5] * 3, std=[60] * 3)\n'
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]\n"
        'test_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(\n'
        f"    type='CustomDataset', data_root={str(folder)!r},\n"
        "    ann_file='labels.txt', pipeline=pipeline))\n"
        "test_evaluator = dict(type='Accuracy', topk=(1,))\n"
    )
    checkpoint = folder / 'model.pth'
    torch.save(dict(state_dict=project_classifier().float().state_dict()), checkpoint)
    paths = [folder / f'{i}.png' for i in range(10)]
    # Stripes and noise, what the weights were trained on.
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:14, :11]
    waves = [rows, columns, rows + columns, rows - columns]
    for i, path in enumerate(paths):
        values = np.sin(0.9 * waves[i % 4])[..., None] + rng.normal(0, 0.5, (14, 11, 3))
        pixels = (127.5 + 60 * values).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    labels = [(p + (i % 3 == 0)) % 4 for i, p in enumerate(predicted(config, paths))]
    lines = [f'{p.name} {c}\n' for p, c in zip(paths, labels, strict=True)]
    (folder / 'labels.txt').write_text(''.join(lines))
    return SimpleNamespace(
        config=config, checkpoint=checkpoint, paths=paths, labels=labels
    )


def model_of(config):
    cfg = Config.fromfile(str(config))
    checkpoint = config.parent / 'model.pth'
    return cfg, load_model(cfg, str(checkpoint), 'cpu')


def predicted(config, paths, **solver):
    """Labels of images, one by one, with other settings of the solver."""
    cfg, model = model_of(config)
    vars(model.backbone.equilibrium.eval_solver).update(solver)
    with torch.no_grad():
        return [model.test_step(load_image(cfg, p))[0].pred_label.item() for p in paths]


@pytest.fixture(scope='module')
def report(tool, case, tmp_path_factory):
    """Folder and figures of a report on the case."""
    out = tmp_path_factory.mktemp('report')
    tool.main([str(case.config), str(case.checkpoint), '--device', 'cpu',
               '--out-dir', str(out), '--radius-images', '3',
               '--starts', '2'])  # fmt: skip
    return out, json.loads((out / 'convergence.json').read_text())


def accuracy(case, **solver):
    found = predicted(case.config, case.paths, **solver)
    return 100 * np.mean(np.array(found) == case.labels)


def test_scores_are_those_of_a_plain_evaluation(case, report):
    scores = report[1]['scores']
    assert scores['shown'] == ['accuracy/top1']
    assert scores['evaluation']['accuracy/top1'] == pytest.approx(accuracy(case))
    by_limit = {s['limit']: s['accuracy/top1'] for s in scores['by_limit']}
    assert list(by_limit) == [1, 2, 3, 4, 6, 8, 12, 16]
    for limit in (1, 2, STEPS):
        expected = accuracy(case, tol=0.0, max_steps=limit)
        assert by_limit[limit] == pytest.approx(expected)
    # The labels were made with the checkpoint: 6 of 10 are right at the equilibrium.
    assert by_limit[STEPS] == pytest.approx(60)


def test_residuals_and_evaluations_are_those_of_the_solves(case, report):
    cfg, model = model_of(case.config)
    found = report[1]['images']
    assert [i['path'].rsplit('/')[-1] for i in found] == [p.name for p in case.paths]
    with torch.no_grad():
        for image in found:
            model.test_step(load_image(cfg, image['path']))
            solution = model.backbone.last_solution
            assert image['evaluations'] == solution.steps.item()
            assert image['residual'] == pytest.approx(solution.residual.item(), rel=0.1)
            assert image['status'] == 'converged'
    evaluation = report[1]['evaluation']
    assert evaluation['shares'] == {
        s.name.lower(): float(s == Status.CONVERGED) for s in Status
    }
    steps = [image['evaluations'] for image in found]
    assert evaluation['evaluations']['mean'] == pytest.approx(np.mean(steps))
    assert evaluation['evaluations']['50%'] in sorted(steps)[4:6]
    residuals = [image['residual'] for image in found]
    assert evaluation['residual']['95%'] == pytest.approx(max(residuals))
    assert max(residuals) <= TOL


def test_traces_go_on_to_the_limit(case, report):
    trace = report[1]['trace']
    assert list(trace) == ['5%', '25%', '50%', '75%', '95%']
    assert all(len(line) == STEPS for line in trace.values())
    # From zero the relative residual is 1, and later on it is below TOL.
    assert trace['50%'][0] == pytest.approx(1)
    assert trace['95%'][-1] < TOL


def test_a_contractive_map_has_one_equilibrium(report):
    starts = report[1]['starts']
    assert starts['judged'] == 10 and starts['max_steps'] == 2 * STEPS
    assert starts['zero_not_converged'] == starts['random_not_converged'] == 0
    assert starts['threshold'] == 0.01 and starts['above'] == 0
    assert 0 < starts['median'] <= starts['largest'] < 10 * TOL


def test_the_spectral_radius_is_that_of_the_jacobian(case, report):
    radius = report[1]['radius']
    assert radius['images'] == 3 and radius['not_converged'] == 0
    # Evenly spread: the first, one in the middle, the last.
    cfg, model = model_of(case.config)
    calls = []
    layer = model.backbone.equilibrium
    layer.register_forward_pre_hook(lambda layer, args: calls.append(args))
    layer.eval_solver.tol = 0
    with torch.no_grad():
        model.test_step(load_image(cfg, case.paths[-1]))
        equation = layer.equation(*calls[0])
    z = layer.last_solution.value
    jacobian = torch.autograd.functional.jacobian(lambda z: equation(z[None])[0], z[0])
    expected = torch.linalg.eigvals(jacobian.double()).abs().max().item()
    assert radius['each'][-1]['radius'] == pytest.approx(expected, rel=0.02)
    assert radius['largest'] < 1 and radius['at_least_one'] == 0


def test_the_report_says_it_in_tables_and_a_picture(case, report):
    text = (report[0] / 'convergence.md').read_text()
    assert '10 of the 10 images of the test set' in text
    assert 'Of the images, 100 % converged.' in text
    assert 'accuracy/top1: 60.00.' in text
    assert '| 10 of 10 |' in text
    with Image.open(report[0] / 'convergence.png') as image:
        assert image.size == (1100, 800)
        assert len(np.unique(np.asarray(image))) > 100


def test_nothing_converges(tool, case, tmp_path, capsys):
    """Said as it is, without starts to compare; and images are spread evenly."""
    tool.main([str(case.config), str(case.checkpoint), '--device', 'cpu', '--out-dir',
               str(tmp_path), '--images', '4', '--max-steps', '1', '--tol', '1e-9',
               '--starts', '1', '--radius-images', '1'])  # fmt: skip
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'No image converged.' in printed
    assert '100 % stopped at the limit' in printed
    assert 'No image has two starts that converged.' in printed
    figures = json.loads((tmp_path / 'convergence.json').read_text())
    names = [i['path'].rsplit('/')[-1] for i in figures['images']]
    assert names == ['0.png', '3.png', '6.png', '9.png']
    assert figures['starts']['judged'] == 0 and figures['starts']['above'] is None
    assert figures['starts']['zero_not_converged'] == 4
    assert figures['starts']['random_not_converged'] == 4
    assert figures['images'][0]['distance'] is None
    assert figures['radius']['not_converged'] == 1
    assert figures['evaluation']['shares']['max_steps'] == 1
    assert (tmp_path / 'convergence.png').stat().st_size > 0


def test_parts_can_be_left_out(tool, case, tmp_path):
    tool.main([str(case.config), str(case.checkpoint), '--device', 'cpu', '--out-dir',
               str(tmp_path), '--images', '1', '--max-steps', '3', '--starts', '0',
               '--radius-images', '0'])  # fmt: skip
    figures = json.loads((tmp_path / 'convergence.json').read_text())
    assert figures['radius'] is figures['starts'] is None
    assert 'distance' not in figures['images'][0]


# Maps made by hand


class Handmade(nn.Module):
    """A model whose backbone solves one map of one's own, and predicts nothing."""

    def __init__(self, f, **solver):
        super().__init__()
        solver = dict(type='PicardSolver') | solver
        self.backbone = nn.Module()
        self.backbone.equilibrium = EquilibriumLayer(
            f, solver, dict(type='ImplicitGradient')
        )
        self.eval()

    def test_step(self, batch):
        from mmpretrain.structures import DataSample

        x = torch.stack(batch['inputs'])
        self.backbone.equilibrium([torch.zeros_like(x)], x)
        samples = [DataSample() for _ in x]
        return [s.set_gt_label(0).set_pred_label(0) for s in samples]


class TwoRoots(nn.Module):
    """z = tanh(3 z + x) has roots near -1 and 1 where x is small."""

    def forward(self, maps, x):
        return [torch.tanh(3 * maps[0] + x)]


class Expanding(nn.Module):
    def forward(self, maps, x):
        return [x - 3 * maps[0]]


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer('weight', weight)

    def forward(self, maps, x):
        return [maps[0] @ self.weight.T + x]


def new_study(tool, model, starts=3):
    init_default_scope('mmpretrain')
    cfg = ConfigDict(test_evaluator=dict(type='Accuracy'))
    return tool.Study(model, cfg, {}, starts)


def study_of(tool, model, inputs, looked_at=()):
    study = new_study(tool, model)
    study.add(dict(inputs=list(inputs)), looked_at)
    return study.figures()


def test_two_equilibria_are_told_from_one(tool):
    x = torch.full((2, 64), 0.1)
    # Far from zero there is one root alone.
    x[1] = 9
    figures = study_of(tool, Handmade(TwoRoots(), tol=1e-4), x)
    starts = figures['starts']
    assert starts['judged'] == 2 and starts['above'] == 0.5
    two, one = (image['distance'] for image in figures['images'])
    # About half of the entries of two random starts end at different roots.
    assert 1 < two < 2 and one < 1e-4
    assert starts['largest'] == two


def test_starts_are_reproducible(tool):
    x = torch.full((1, 64), 0.1)
    found = [study_of(tool, Handmade(TwoRoots(), tol=1e-4), x) for _ in range(2)]
    assert found[0] == found[1]


def test_the_radius_of_a_known_map(tool):
    weight = matrix(12, 0.6)
    x = torch.randn(3, 12, dtype=torch.float64)
    model = Handmade(Linear(weight), tol=1e-6, max_steps=60)
    figures = study_of(tool, model, x, [0, 2])
    radius = figures['radius']
    assert radius['images'] == 2
    assert radius['largest'] == pytest.approx(0.6, rel=0.05)
    # The solves without a tolerance went on to a closer state.
    assert all(one['residual'] < 1e-10 for one in radius['each'])
    assert figures['starts']['largest'] < 1e-4


def test_a_map_without_convergence(tool):
    model = Handmade(Expanding(), tol=1e-4, max_steps=40)
    figures = study_of(tool, model, torch.randn(2, 8), [0])
    assert figures['evaluation']['shares']['converged'] == 0
    assert figures['starts']['judged'] == 0
    assert figures['radius']['median'] == pytest.approx(3)
    assert figures['radius']['at_least_one'] == 1


class Broken(nn.Module):
    def forward(self, maps, x):
        return [maps[0] / 0 + x]


def test_a_map_that_is_never_finite(tool, tmp_path):
    figures = study_of(tool, Handmade(Broken(), tol=1e-4), torch.randn(2, 8), [0])
    assert figures['evaluation']['shares']['diverged'] == 1
    assert figures['starts']['judged'] == 0
    assert json.loads(tool.to_json(figures))['evaluation']['residual']['50%'] is None
    tool.draw(figures, 'title', tmp_path / 'broken.png')
    text = ' '.join(section.markdown() for section in tool.sections(figures))
    assert 'No image converged. Of the images, 100 % diverged.' in text
    assert '| relative residual of no more than | inf |' in text


def test_distances_of_a_slow_map_are_doubted(tool):
    """One equilibrium; residuals of 1e-3 are reached far from it."""
    model = Handmade(Linear(0.99 * torch.eye(4)), tol=1e-3, max_steps=300)
    figures = study_of(tool, model, torch.tensor([[1.0, -2.0, 3.0, 0.5]]), [0])
    starts = figures['starts']
    assert starts['judged'] == 1 and starts['above'] == 1
    assert starts['threshold'] < starts['largest'] < 0.25
    text = ' '.join(tool.sections(figures)[-1].notes)
    # 2 x 1e-3 / (1 - 0.99).
    assert 'a spectral radius of 0.990 (median)' in text
    assert 'may be 0.2 apart' in text


def test_distances_of_windows_are_the_worst_of_an_image(tool):
    """Two solves of two images each."""
    study = new_study(tool, Handmade(TwoRoots(), tol=1e-4))
    x = torch.full((2, 64), 9.0)
    other = x.clone()
    other[1] = 0.1
    calls = [([torch.zeros_like(x)], x), ([torch.zeros_like(x)], other)]
    images = [{}, {}]
    with torch.no_grad():
        study._compare_starts(images, calls)
    assert images[0]['distance'] < 1e-4 and images[1]['distance'] > 1
    assert [i['failed'] for i in images] == [[False, 0], [False, 0]]


def test_random_starts_have_the_scale_of_each_map(tool):
    study = new_study(tool, Handmade(TwoRoots()))
    maps = torch.ones(2, 4000) * torch.tensor([[1.0], [5.0]])
    found = study._random_like(maps)
    np.testing.assert_allclose(found.std(1), [1, 5], rtol=0.05)
    np.testing.assert_allclose(found.mean(1), [0, 0], atol=0.3)
    assert StateSpec.of([found]) == StateSpec.of([maps])


def test_what_is_not_finite_is_null_in_json(tool):
    text = tool.to_json(dict(a=[math.inf, 1.0], b=(math.nan,), c='x', d=0))
    assert json.loads(text) == dict(a=[None, 1.0], b=[None], c='x', d=0)


def test_images_are_spread_evenly(tool):
    assert tool.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert tool.spread(3, 200).tolist() == [0, 1, 2]
    assert tool.spread(5, 0).tolist() == []


# Segmentation


@pytest.fixture
def segmentation(tmp_path):
    """A segmentor with random weights and sliding windows, and two images."""
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    solver = dict(type='AndersonSolver', max_steps=3, tol=1e-6)
    arch = dict(channels=(8, 8), num_groups=4, expansion=1, downsample_times=1)
    model = segmentor_config((8, 8), 3, arch=arch, eval_solver=solver)
    # Windows at columns 0 and 16.
    model['test_cfg'] = dict(mode='slide', crop_size=(16, 16), stride=(16, 16))
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmseg'\n"
        "custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)\n"
        f'model = {model!r}\n'
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), "
        "dict(type='PackSegInputs')]\n"
        "test_dataloader = dict(dataset=dict(type='BaseSegDataset', "
        f"data_root={str(tmp_path)!r}, img_suffix='.png', pipeline=pipeline, "
        "data_prefix=dict(img_path='images', seg_map_path='labels'), "
        "metainfo=dict(classes=('a', 'b', 'c'))))\n"
        "test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])\n"
    )
    rng = np.random.default_rng(0)
    for name, shape in (('images', (16, 32, 3)), ('labels', (16, 32))):
        (tmp_path / name).mkdir()
        for i in range(2):
            values = rng.integers(0, 256 if name == 'images' else 3, shape)
            image = Image.fromarray(values.astype(np.uint8))
            image.save(tmp_path / name / f'{i}.png')
    torch.manual_seed(0)
    build = Config.fromfile(str(config))
    torch.save(dict(state_dict=load_model(build).state_dict()), tmp_path / 'model.pth')
    return config


def test_segmentation_with_sliding_windows(tool, segmentation, capsys):
    folder = segmentation.parent
    tool.main([str(segmentation), str(folder / 'model.pth'), '--device', 'cpu',
               '--out-dir', str(folder / 'out'), '--starts', '1'])  # fmt: skip
    assert 'mIoU' in capsys.readouterr().out
    figures = json.loads((folder / 'out' / 'convergence.json').read_text())
    # Two windows of three evaluations each.
    assert [i['evaluations'] for i in figures['images']] == [6, 6]
    assert figures['radius']['images'] == 2
    cfg, model = model_of(segmentation)
    areas = np.zeros((2, 3))
    for i in range(2):
        solutions = []
        handle = model.backbone.equilibrium.register_forward_hook(
            lambda layer, args, out, found=solutions: found.append(layer.last_solution)
        )
        with torch.no_grad():
            (sample,) = model.test_step(load_image(cfg, folder / 'images' / f'{i}.png'))
        handle.remove()
        worst = max(s.residual.item() for s in solutions)
        assert len(solutions) == 2
        assert figures['images'][i]['residual'] == pytest.approx(worst, rel=1e-4)
        found = sample.pred_sem_seg.data.squeeze().numpy()
        labels = np.array(Image.open(folder / 'labels' / f'{i}.png'))
        for c in range(3):
            areas[:, c] += (
                ((found == c) & (labels == c)).sum(),
                ((found == c) | (labels == c)).sum(),
            )
    expected = 100 * (areas[0] / areas[1]).mean()
    scores = figures['scores']
    assert scores['shown'] == ['mIoU']
    # mmseg rounds to two decimals.
    assert scores['evaluation']['mIoU'] == pytest.approx(expected, abs=0.006)
    assert scores['by_limit'][-1]['mIoU'] == pytest.approx(expected, abs=0.006)


# Refusals


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--images', '0'], '--images is 0; it has to be at least 1'),
        (['--max-steps', '0'], '--max-steps is 0'),
        (['--radius-images', '-1'], '--radius-images is -1'),
        (['--starts', '-1'], '--starts is -1'),
        (['--tol', '0'], 'has to be above 0'),
    ],
)
def test_bad_options_are_refused(tool, case, arguments, words, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(case.config), str(case.checkpoint), *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ('lines', 'words'),
    [
        ('del test_evaluator\n', 'has no test_evaluator'),
        ("test_dataloader['dataset']['ann_file'] = 'none.txt'\n", 'none.txt'),
        (
            "test_dataloader['dataset']['data_root'] = 'nowhere'\n",
            "'nowhere', which is",
        ),
        ("test_dataloader['dataset']['ann_file'] = 'empty.txt'\n", 'test_dataloader'),
        (
            "model = dict(type='ImageClassifier', backbone=dict(type='ResNet', "
            "depth=18), neck=dict(type='GlobalAveragePooling'), head=dict("
            "type='LinearClsHead', num_classes=2, in_channels=512))\n",
            'has no backbone of type MDEQ',
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(tool, case, tmp_path, lines, words):
    config, checkpoint = tmp_path / 'other.py', case.checkpoint
    config.write_text(case.config.read_text() + lines)
    (case.config.parent / 'empty.txt').write_text('')
    if 'ResNet' in lines:
        cfg = Config.fromfile(str(config))
        checkpoint = tmp_path / 'resnet.pth'
        torch.save(dict(state_dict=load_model(cfg).state_dict()), checkpoint)
    with pytest.raises(SystemExit, match=words):
        tool.main([str(config), str(checkpoint), '--device', 'cpu', '--out-dir',
                   str(tmp_path / 'out')])  # fmt: skip


def test_the_data_root_can_be_given(tool, case, tmp_path):
    with pytest.raises(SystemExit, match=r"data_root is '/no/data', which is not"):
        tool.main([str(case.config), str(case.checkpoint), '--data-root', '/no/data'])


def test_missing_checkpoints_are_refused(tool, case):
    with pytest.raises(SystemExit, match=r"checkpoint 'no\.pth' does not exist"):
        tool.main([str(case.config), 'no.pth'])
