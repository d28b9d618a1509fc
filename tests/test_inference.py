"""The toolboxes' own ways to predict, with our configs and checkpoints; solvers set
when they are called.
"""

import copy
from importlib.util import find_spec
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from sklearn.datasets import load_digits

from mdeq_mm.apis.inference import load_image, load_images, load_model
from mdeq_mm.apis.solver_settings import set_solver
from mdeq_mm.checkpoints import allow_runner_checkpoints
from mdeq_mm.implicit import EquilibriumLayer
from tests.helpers import ROOT, project_classifier, project_golden

DIGITS = 'configs/demo/mdeq_1xb64-30e_digits.py'
SCENES = 'configs/demo/mdeq_1xb16-12e_digit-scenes-64x64.py'
TOOLBOXES = {DIGITS: 'mmpretrain', SCENES: 'mmseg'}


def write_images(folder, config, count=3):
    """Digits of 8x8 pixels, or four of them on 64x64, as grey files."""
    digits = (load_digits().images * 15).astype(np.uint8)
    paths = []
    for i in range(count):
        image = digits[i]
        if config == SCENES:
            four = digits[4 * i : 4 * i + 4].reshape(2, 2, 8, 8)
            image = cv2.resize(four.transpose(0, 2, 1, 3).reshape(16, 16), (64, 64))
        paths.append(str(folder / f'{i}.png'))
        assert cv2.imwrite(paths[-1], image)
    return paths


def write_checkpoint(path, model, dataset_meta):
    """Save weights as a Runner does: beside them lies what only mmengine can read."""
    hub = MessageHub(f'inference {path.stem}')
    hub.update_scalar('train/loss', 1.5)
    meta = dict(epoch=1, iter=18, experiment_name='x', dataset_meta=dataset_meta)
    content = dict(
        meta=meta, state_dict=model.state_dict(), message_hub=hub.state_dict()
    )
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope='module', params=[DIGITS, SCENES], ids=['digits', 'scenes'])
def case(request, tmp_path_factory):
    """Config, checkpoint and images of a task, and the model that made it."""
    config = request.param
    if find_spec(TOOLBOXES[config]) is None:
        pytest.skip(f'{TOOLBOXES[config]} is not installed')
    folder = tmp_path_factory.mktemp(TOOLBOXES[config])
    cfg = Config.fromfile(ROOT / config)
    torch.manual_seed(1)
    model = load_model(cfg, device='cpu')
    meta = dict(classes=tuple('0123456789'))
    if config == SCENES:
        meta = dict(cfg.metainfo.to_dict())
    return SimpleNamespace(
        toolbox=TOOLBOXES[config],
        config=str(ROOT / config),
        cfg=cfg,
        model=model,
        meta=meta,
        checkpoint=write_checkpoint(folder / 'epoch_1.pth', model, meta),
        images=write_images(folder, config),
        folder=folder,
    )


def scores(sample):
    """Scores of an image, or logits of its pixels."""
    return (
        sample.pred_score if hasattr(sample, 'pred_score') else sample.seg_logits.data
    )


def expected_of(case):
    """What ``model.test_step`` says to single images."""
    with torch.no_grad():
        return [case.model.test_step(load_image(case.cfg, p))[0] for p in case.images]


def inferencer_of(case, **options):
    """The toolbox's inferencer, from config file and checkpoint file."""
    allow_runner_checkpoints()
    if case.toolbox == 'mmpretrain':
        from mmpretrain import ImageClassificationInferencer

        return ImageClassificationInferencer(case.config, case.checkpoint, **options)
    from mmseg.apis import MMSegInferencer

    return MMSegInferencer(case.config, case.checkpoint, **options)


def samples_of(case, inferencer, inputs, **options):
    """Data samples that an inferencer returns."""
    if case.toolbox == 'mmpretrain':
        return inferencer(inputs, return_datasamples=True, **options)
    # mmseg names the argument differently in __call__ and in what that hands it to.
    found = []
    for batch in inferencer.preprocess(inferencer._inputs_to_list(inputs), **options):
        found += inferencer.forward(batch)
    return found


def check(found, expected):
    assert len(found) == len(expected)
    for sample, other in zip(found, expected, strict=True):
        torch.testing.assert_close(scores(sample), scores(other), rtol=1e-5, atol=1e-5)
        assert sample.equilibrium_steps == other.equilibrium_steps > 10
        assert sample.equilibrium_status == other.equilibrium_status


def test_images_predicted_differ(case):
    """What the others compare would otherwise say nothing."""
    first, second, _ = expected_of(case)
    assert (scores(first) - scores(second)).abs().max() > 1e-3


@pytest.mark.parametrize('batch_size', [1, 2])
def test_inferencers_predict_as_test_step_does(case, batch_size):
    inferencer, expected = inferencer_of(case, device='cpu'), expected_of(case)
    check(samples_of(case, inferencer, case.images[0]), expected[:1])
    check(samples_of(case, inferencer, case.images, batch_size=batch_size), expected)
    for flag in (cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR):
        arrays = [cv2.imread(path, flag) for path in case.images]
        check(samples_of(case, inferencer, arrays, batch_size=batch_size), expected)
        check(samples_of(case, inferencer, arrays[0]), expected[:1])


def test_inferencers_return_labels_and_pictures(case):
    inferencer, expected = inferencer_of(case, device='cpu'), expected_of(case)
    out = case.folder / 'pictures'
    labels = [scores(sample).argmax(0).numpy() for sample in expected]
    if case.toolbox == 'mmpretrain':
        found = inferencer(case.images, batch_size=3, show_dir=str(out))
        assert [one['pred_label'] for one in found] == labels
        assert [one['pred_class'] for one in found] == [str(x) for x in labels]
    else:
        found = inferencer(case.images, batch_size=3, out_dir=str(out))
        for one, label in zip(found['predictions'], labels, strict=True):
            np.testing.assert_array_equal(one, label)
        assert inferencer.model.dataset_meta['palette'] == case.meta['palette']
        out = out / 'vis'
    assert {path.name for path in out.glob('*.png')} == {'0.png', '1.png', '2.png'}


def test_init_model_and_inference_model(case):
    allow_runner_checkpoints()
    expected = expected_of(case)
    if case.toolbox == 'mmpretrain':
        from mmpretrain import ImageClassificationInferencer
        from mmpretrain.apis import init_model

        model = init_model(case.config, case.checkpoint, device='cpu')
        # mmpretrain's inference_model takes registered models alone.
        check(ImageClassificationInferencer(model)(case.images, True), expected)
        return
    from mmseg.apis import inference_model, init_model

    model = init_model(case.config, case.checkpoint, device='cpu')
    check([inference_model(model, case.images[0])], expected[:1])
    check(inference_model(model, case.images), expected)
    arrays = [cv2.imread(path) for path in case.images]
    check(inference_model(model, arrays), expected)


def test_inference_model_of_mmpretrain_for_a_registered_model(case, tmp_path):
    if case.toolbox != 'mmpretrain':
        pytest.skip('mmseg has no register')
    allow_runner_checkpoints()
    from mmpretrain import inference_model
    from mmpretrain.apis import ModelHub

    (tmp_path / 'model-index.yml').write_text('Import:\n  - metafile.yml\n')
    (tmp_path / 'metafile.yml').write_text(
        'Models:\n'
        '  - Name: registered-here-digits\n'
        '    In Collection: MDEQ\n'
        f'    Config: {case.config}\n'
        f'    Weights: {case.checkpoint}\n'
        '    Results:\n'
        '      - Task: Image Classification\n'
        '        Dataset: Digits\n'
        '        Metrics: {Top 1 Accuracy: 10.0}\n'
        'Collections:\n'
        '  - Name: MDEQ\n'
    )
    ModelHub.register_model_index(tmp_path / 'model-index.yml', tmp_path)
    found = inference_model('registered-here-digits', case.images[0])
    expected = scores(expected_of(case)[0])
    np.testing.assert_allclose(found['pred_scores'], expected, rtol=1e-5, atol=1e-6)


def test_weights_without_anything_beside_them(case, tmp_path):
    """Names and colours are then the toolboxes' affair, predictions are the same."""
    plain = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=case.model.state_dict(), meta={}), plain)
    case = SimpleNamespace(**vars(case) | dict(checkpoint=str(plain)))
    found = samples_of(case, inferencer_of(case, device='cpu'), case.images)
    check(found, expected_of(case))


def test_weights_of_another_architecture_are_refused(case, tmp_path):
    state = case.model.state_dict()
    name = next(k for k in state if k.startswith('backbone.') and state[k].dim() == 4)
    wrong = tmp_path / 'wrong.pth'
    state[name] = state[name][:-1]
    torch.save(dict(state_dict=state, meta={}), wrong)
    case = SimpleNamespace(**vars(case) | dict(checkpoint=str(wrong)))
    with pytest.raises(RuntimeError, match=name):
        inferencer_of(case, device='cpu')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_inferencers_on_a_gpu(case):
    inferencer = inferencer_of(case, device='cuda:0')
    found = samples_of(case, inferencer, case.images, batch_size=3)
    assert inferencer.model.backbone.last_solution.value.is_cuda
    for sample, other in zip(found, expected_of(case), strict=True):
        # A random f is not contractive: rounding grows over 30 evaluations.
        difference = (scores(sample).cpu() - scores(other)).abs().max()
        assert difference < 0.1 * scores(other).abs().max()


def test_batches_of_files_and_of_arrays(case):
    """As OpenCV has them, grey or in colour."""
    expected = load_images(case.cfg, case.images)['inputs']
    for flag in (cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR):
        arrays = [cv2.imread(path, flag) for path in case.images]
        found = load_images(case.cfg, arrays)
        for one, other in zip(found['inputs'], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        size = arrays[0].shape[:2]
        assert all(s.ori_shape == size for s in found['data_samples'])


@pytest.mark.parametrize(
    ('reader', 'shape', 'dtype'),
    [
        (dict(), (3, 8, 8), torch.uint8),
        (dict(color_type='grayscale'), (1, 8, 8), torch.uint8),
        (dict(color_type='unchanged', to_float32=True), (1, 8, 8), torch.float32),
    ],
)
def test_arrays_become_what_files_are_read_as(reader, shape, dtype, tmp_path):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    import mmpretrain.datasets  # noqa: F401

    steps = [dict(type='LoadImageFromFile', **reader), dict(type='PackInputs')]
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            test_dataloader=dict(dataset=dict(pipeline=steps)),
        )
    )
    (path,) = write_images(tmp_path, DIGITS, 1)
    batch = load_images(cfg, [path, cv2.imread(path, cv2.IMREAD_GRAYSCALE)])
    first, second = batch['inputs']
    assert first.shape == shape and first.dtype == dtype
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# Solvers set when they are called


@pytest.fixture
def model():
    """A contractive classifier, and images for it."""
    solver = dict(type='AndersonSolver', max_steps=30, tol=1e-6)
    return project_classifier(eval_solver=None, solver=solver)


def solve(model):
    with torch.no_grad():
        model.extract_feat(project_golden()['input'].double())
    return model.backbone.last_solution


def layer_of(model):
    (layer,) = (m for m in model.modules() if isinstance(m, EquilibriumLayer))
    return layer


def test_fewer_evaluations_leave_a_larger_residual(model):
    full = solve(model)
    assert full.converged.all() and full.steps.min() > 4
    with set_solver(model, max_steps=4):
        few = solve(model)
    assert (few.steps == 4).all()
    assert (few.residual > 10 * full.residual).all()
    again = solve(model)
    assert torch.equal(again.value, full.value) and torch.equal(again.steps, full.steps)


def test_a_tolerance_ends_solves_sooner(model):
    full = solve(model)
    set_solver(model, tol=1e-2)
    loose = solve(model)
    assert (loose.steps < full.steps).all() and loose.converged.all()
    assert (loose.residual <= 1e-2).all() and (loose.residual > 1e-6).all()
    set_solver(model, tol=0, max_steps=9)
    assert (solve(model).steps == 9).all()


def test_training_keeps_its_solver(model):
    """Which is the very object that evaluation uses where the config has one."""
    layer = layer_of(model)
    before = layer.solver
    assert layer.eval_solver is before
    with set_solver(model, max_steps=3, tol=0.5):
        assert (before.max_steps, before.tol) == (30, 1e-6)
        assert layer.solver is before
        model.train()
        model.extract_feat(project_golden()['input'].double())
        assert model.backbone.last_solution.steps.min() > 3
        model.eval()
        assert solve(model).steps.max() <= 3
    assert layer.eval_solver is before


def test_what_is_not_given_stays(model):
    solver = layer_of(model).eval_solver
    with set_solver(model, tol=1e-3):
        changed = layer_of(model).eval_solver
        expected = vars(solver) | dict(tol=1e-3)
        assert vars(changed) == expected and type(changed) is type(solver)
        with set_solver(model):
            assert vars(layer_of(model).eval_solver) == expected


def test_nested_settings_are_restored_one_by_one(model):
    layer = layer_of(model)
    first = layer.eval_solver
    with set_solver(model, max_steps=5):
        with set_solver(model, tol=0.1), pytest.raises(KeyError):
            assert (layer.eval_solver.max_steps, layer.eval_solver.tol) == (5, 0.1)
            raise KeyError
        assert (layer.eval_solver.max_steps, layer.eval_solver.tol) == (5, 1e-6)
    assert layer.eval_solver is first
    settings = set_solver(model, max_steps=7)
    settings.restore()
    set_solver(model, max_steps=8)
    settings.restore()
    assert layer.eval_solver.max_steps == 8


def test_copies_are_models_of_their_own(model):
    with set_solver(model, max_steps=5):
        copied = copy.deepcopy(model)
        with set_solver(copied, max_steps=6):
            assert (solve(model).steps == 5).all()
            assert (solve(copied).steps == 6).all()
    assert (solve(copied).steps == 5).all()
    assert solve(model).steps.min() > 6


def test_one_solver_of_two_models(model):
    other = project_classifier(solver=layer_of(model).solver)
    with set_solver(model, max_steps=5):
        assert (solve(model).steps == 5).all()
        assert solve(other).steps.min() > 5


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


WAYS = {
    'backbone': lambda model: model.backbone,
    'layer': layer_of,
    'wrapped': Wrapper,
    'inferencer': lambda model: SimpleNamespace(model=model),
    'inferencer of a wrapped one': lambda model: SimpleNamespace(model=Wrapper(model)),
}


@pytest.mark.parametrize('way', WAYS)
def test_a_model_however_it_comes(model, way):
    with set_solver(WAYS[way](model), max_steps=5):
        assert (solve(model).steps == 5).all()
    assert solve(model).steps.min() > 5


def test_solvers_of_inferencers(case):
    inferencer = inferencer_of(case, device='cpu')
    with set_solver(inferencer, max_steps=3):
        found = samples_of(case, inferencer, case.images, batch_size=2)
    assert [sample.equilibrium_steps for sample in found] == [3, 3, 3]
    check(samples_of(case, inferencer, case.images), expected_of(case))


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (dict(max_steps=0), ValueError, 'max_steps=0 is too small: use 1 or more'),
        (dict(max_steps=2.5), TypeError, 'max_steps must be an integer, got 2.5'),
        (dict(max_steps=True), TypeError, 'max_steps must be an integer, got True'),
        (dict(tol=-1e-3), ValueError, 'tol=-0.001 is out of range'),
        (dict(tol=float('nan')), ValueError, 'tol=nan is out of range'),
        (dict(tol='1e-3'), TypeError, "tol must be a number, got '1e-3'"),
        (dict(max_steps=5, tol=-1), ValueError, 'tol=-1 is out of range'),
    ],
)
def test_settings_that_no_solver_takes(model, arguments, error, words):
    before = layer_of(model).eval_solver
    with pytest.raises(error, match=words):
        set_solver(model, **arguments)
    assert layer_of(model).eval_solver is before


def test_models_that_solve_nothing(model):
    with pytest.raises(ValueError, match='model=Linear has no equilibrium'):
        set_solver(torch.nn.Linear(2, 2), max_steps=4)
    with pytest.raises(TypeError, match='model is a str: give a model'):
        set_solver('mdeq', max_steps=4)
    layer_of(model).unroll_steps = 4
    with pytest.raises(ValueError, match=r'unroll_steps=4 .* set it to None first'):
        set_solver(model, max_steps=4)
