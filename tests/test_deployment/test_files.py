"""Exported files against the models that they were made of."""

import builtins
import re

import numpy as np
import pytest
import torch

from mdeq_mm.deployment import (
    DeployableModel,
    load_program,
    save_program,
    to_onnx,
    trace,
    write_onnx,
)
from mdeq_mm.deployment.onnx_file import REQUIREMENTS, require
from tests.helpers import ROOT, build_segmentor, project_classifier, segmentor_config
from tests.test_deployment.models import (
    ARCH,
    digits,
    small_classifier,
    small_segmentor,
)

pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
STEPS = 6


def onnx_or_skip():
    """The package onnx, where all that ONNX files need is installed."""
    for name in ('onnxruntime', 'onnxscript'):
        pytest.importorskip(name, reason=f'{name} is not installed: {REQUIREMENTS}')
    return pytest.importorskip('onnx', reason=f'onnx is not installed: {REQUIREMENTS}')


def run(path, images):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(path), options, providers=['CPUExecutionProvider']
    )
    return session.run(None, {'images': images.numpy()})


def off(found, expected):
    """Largest difference of the first outputs."""
    return np.abs(found[0] - expected[0].numpy()).max()


@pytest.fixture(scope='module')
def contractive():
    """A model that converges, for odd sizes, with its residual."""
    model = project_classifier(
        eval_solver=dict(type='AndersonSolver', max_steps=STEPS, tol=1e-3)
    ).float()
    return model, DeployableModel(model, residual=True)


@pytest.fixture(scope='module')
def file(contractive, tmp_path_factory):
    onnx = onnx_or_skip()
    path = tmp_path_factory.mktemp('onnx') / 'below' / 'model.onnx'
    metadata = dict(mean=[1.5], config='x.py', classes=['a', 'b'])
    write_onnx(to_onnx(contractive[1], (3, 31, 27), metadata=metadata), path)
    return path, onnx.load(path)


@pytest.mark.parametrize('batch', [1, 3])
@torch.no_grad()
def test_any_number_of_images_of_odd_size(contractive, file, batch):
    model, deployable = contractive
    images = torch.randn(batch, 3, 31, 27)
    scores, residual = run(file[0], images)
    assert scores.shape == (batch, deployable.head.num_classes)
    assert np.abs(scores.sum(1) - 1).max() < 1e-5
    assert off([scores], deployable(images)) < 1e-5
    layer = model.backbone.equilibrium
    kept, layer.eval_solver = layer.eval_solver, deployable.solver
    model.backbone(images)
    layer.eval_solver = kept
    expected = model.backbone.last_solution.residual.numpy()
    assert np.abs(residual - expected).max() < 1e-5 and expected.min() > 1e-4


def test_weights_and_step_are_there_once(contractive, file):
    path, model = file
    weights = 4 * sum(p.numel() for p in contractive[1].parameters())
    # The rest are nodes and names, of one step.
    assert weights < path.stat().st_size < weights + 100_000
    (loop,) = [node for node in model.graph.node if node.op_type == 'Loop']
    (limit,) = [t for t in model.graph.initializer if t.name == loop.input[0]]
    assert onnx_or_skip().numpy_helper.to_array(limit) == STEPS
    convs = [n.op_type for n in loop.attribute[0].g.node].count('Conv')
    f = contractive[1].backbone.f
    assert convs == sum(isinstance(m, torch.nn.Conv2d) for m in f.modules())


def test_the_file_tells_of_itself_and_not_of_this_machine(file):
    path, model = file
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found == dict(mean='[1.5]', config='x.py', classes='["a", "b"]')
    assert str(ROOT).encode() not in path.read_bytes()
    (images,) = model.graph.input
    dims = images.type.tensor_type.shape.dim
    assert dims[0].dim_param == 'batch'
    assert [d.dim_value for d in dims[1:]] == [3, 31, 27]
    assert [o.name for o in model.graph.output] == ['scores', 'residual']


@torch.no_grad()
def test_unrolled_plain_iteration_with_a_fixed_batch_and_opset(tmp_path):
    onnx = onnx_or_skip()
    model = DeployableModel(small_classifier(), 3, 'picard', preprocessing=True)
    path = tmp_path / 'model.onnx'
    write_onnx(to_onnx(model, (1, 12, 15), batch=3, opset=18, unroll=True), path)
    images = digits(3, (12, 15)) * 95.9 + 77.8
    assert off(run(path, images), model(images)) < 1e-5
    found = onnx.load(path)
    (step,) = found.functions
    calls = [node for node in found.graph.node if node.op_type == step.name]
    assert len(calls) == 3
    # All with the same weights, which are there once.
    assert all(node.input[-5:] == calls[0].input[-5:] for node in calls)
    names = [tensor.name for tensor in found.graph.initializer]
    assert len(names) == len(set(names))
    assert {o.domain: o.version for o in found.opset_import}[''] == 18
    assert found.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


@torch.no_grad()
def test_segmentation_by_anderson_in_single_precision(tmp_path):
    onnx_or_skip()
    model = DeployableModel(small_segmentor(), 3, precision=torch.float32)
    path = tmp_path / 'model.onnx'
    file = to_onnx(model, (1, 21, 14))
    write_onnx(file, path)
    for batch in (1, 2):
        images = digits(batch, (21, 14))
        found = run(path, images)
        assert found[0].shape == (batch, 3, 21, 14)
        assert off(found, model(images)) < 1e-4
    # Neither constants nor casts of double precision.
    assert not re.search(r'(data_type: 11|i: 11)\b', str(file))


@torch.no_grad()
def test_programs_of_torch_export_come_back(tmp_path):
    model = DeployableModel(small_classifier(), 2, residual=True)
    path = tmp_path / 'model.pt2'
    save_program(trace(model, (1, 13, 16)), path, dict(steps=2))
    program, metadata = load_program(path)
    assert metadata == dict(steps=2)
    for batch in (1, 3):
        images = digits(batch, (13, 16))
        for found, expected in zip(program(images), model(images), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('form', ['loop', 'program'])
@torch.no_grad()
def test_the_image_in_every_branch_at_an_odd_size(form, tmp_path):
    """Three injections and normalised outputs, against the model itself."""
    arch = ARCH | dict(channels=(8, 8, 8))
    config = segmentor_config((8, 8, 8), 3, arch=arch, in_channels=1)
    model = build_segmentor(config)
    assert model.backbone.arch.injected == len(model.backbone.out_norms) == 3
    # Statistics that are not those of the start.
    for _ in range(5):
        model.train().backbone(digits(6, (21, 15)))
    model.eval()
    deployable = DeployableModel(model, 4)
    path = tmp_path / 'model'
    if form == 'program':
        save_program(trace(deployable, (1, 21, 15)), path, {})
        program, _ = load_program(path)
    else:
        onnx_or_skip()
        write_onnx(to_onnx(deployable, (1, 21, 15)), path)
    model.backbone.equilibrium.eval_solver = deployable.solver
    for batch in (1, 3):
        images = digits(batch, (21, 15))
        metas = [dict(img_shape=(21, 15), ori_shape=(21, 15), pad_shape=(21, 15))]
        expected = model.encode_decode(images, metas * batch)
        found = program(images) if form == 'program' else run(path, images)
        assert off([np.asarray(found[0])], [expected]) < 1e-4
    assert model.backbone.last_solution.steps.tolist() == [4] * 3


@pytest.mark.parametrize('opset', [1, 17, 10_000])
def test_opsets_that_cannot_be_written(contractive, opset):
    onnx_or_skip()
    with pytest.raises(ValueError, match=f'opset={opset} cannot be written: use 18 to'):
        to_onnx(contractive[1], (3, 31, 27), opset=opset)
    with pytest.raises(TypeError, match='opset'):
        to_onnx(contractive[1], (3, 31, 27), opset='18')


def test_a_package_that_is_missing(monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == 'onnx':
            raise ModuleNotFoundError("No module named 'onnx'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    with pytest.raises(
        ImportError, match=r'onnx is not.*pip install -r requirements/deployment\.txt'
    ):
        require('onnx')
    assert (ROOT / REQUIREMENTS).exists()
