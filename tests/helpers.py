"""Equations, models and measures that several test files share."""

import importlib.util
import logging
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from mdeq_mm.implicit import (
    AndersonSolver,
    BroydenSolver,
    Equation,
    ImplicitGradient,
    PhantomGradient,
    PicardSolver,
    StateSpec,
    UnrolledGradient,
)
from mdeq_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'

SOLVERS = dict(picard=PicardSolver, anderson=AndersonSolver, broyden=BroydenSolver)


def needs_shared(*parts):
    """Skip a test where a file of the reference data is absent."""
    path = SHARED.joinpath(*parts)
    return pytest.mark.skipif(
        not path.exists(), reason=f'{path.relative_to(ROOT.parent)} is not there'
    )


def relative(found, expected):
    """Relative distance of two tensors, or of two lists of them, as a float."""
    if isinstance(found, list | tuple):
        assert len(found) == len(expected)
        found = torch.cat([t.detach().flatten() for t in found])
        expected = torch.cat([t.detach().flatten() for t in expected])
    assert found.shape == expected.shape, (found.shape, expected.shape)
    norm = torch.linalg.vector_norm(expected.double())
    return (torch.linalg.vector_norm(found.double() - expected) / norm).item()


def cosine(found, expected):
    found = torch.cat([t.detach().double().flatten() for t in found])
    expected = torch.cat([t.detach().double().flatten() for t in expected])
    return (found @ expected / found.norm() / expected.norm()).item()


def load_tool(path):
    """Import a script of tools/ as a module.

    Args:
        path (str): Below the root of the repository.
    """
    path = ROOT / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # What it imports from beside itself, as a script does.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def logged():
    """Collect what the current logger of mmengine is told, as a list of texts."""
    texts = []

    class Collect(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    logger = MMLogger.get_current_instance()
    handler = Collect(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


# Equations


def matrix(dim, radius, dtype=torch.float64, generator=None):
    """A random matrix (dim, dim) that is not normal, of given spectral radius."""
    a = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return (a * (radius / torch.linalg.eigvals(a).abs().max())).to(dtype)


def affine(n=3, dim=6, radius=0.7, recompute=False):
    """f(z) = z A' + x.

    Returns:
        tuple[Equation, Tensor]: The equation, and its solution (N, D).
    """
    a = matrix(dim, radius)
    x = torch.randn(n, dim, dtype=a.dtype)
    equation = Equation(
        lambda z, tensors: z @ tensors[0].T + tensors[1],
        (a, x),
        (False, True),
        recompute,
    )
    eye = torch.eye(dim, dtype=a.dtype)
    return equation, torch.linalg.solve(eye - a, x.T).T


def tanh(n=3, dim=6, radius=0.8, recompute=False, dtype=torch.float64):
    """f(z) = tanh(z W' + x) with W and x that take gradients."""
    w = matrix(dim, radius, dtype).requires_grad_()
    x = torch.randn(n, dim, dtype=dtype).requires_grad_()
    return Equation(
        lambda z, tensors: torch.tanh(z @ tensors[0].T + tensors[1]),
        (w, x),
        (False, True),
        recompute,
    )


class Counting:
    """Counts what passes through an equation: calls and rows."""

    def __init__(self, equation, log=None):
        self.equation = equation
        self.log = [] if log is None else log

    def __call__(self, z, tensors=None):
        self.log.append(len(z))
        return self.equation(z, tensors)

    def take(self, index):
        return Counting(self.equation.take(index), self.log)


class Stretched:
    """The hard map f(z* + factor (z - z*)), whose Jacobian at z* is factor J."""

    def __init__(self, equation, value, factor=2.0):
        self.equation, self.value, self.factor = equation, value, factor

    def __call__(self, z, tensors=None):
        return self.equation(self.value + self.factor * (z - self.value), tensors)

    def take(self, index):
        return Stretched(self.equation.take(index), self.value[index], self.factor)


# Gradients


def gradients_under_test(steps=60):
    """Every kind of gradient, by name, with f kept and recomputed.

    Args:
        steps (int): Steps of those that iterate, enough for the exact gradient.

    Returns:
        dict[str, tuple[Gradient, bool]]: Gradient, and whether f is recomputed.
    """
    solver = BroydenSolver(max_steps=60, tol=1e-13)
    return {
        'implicit': (ImplicitGradient(solver), False),
        'implicit, recomputed': (ImplicitGradient(solver), True),
        'phantom series': (PhantomGradient(steps), False),
        'phantom series, recomputed': (PhantomGradient(steps), True),
        'phantom unrolled': (PhantomGradient(steps, unroll=True), False),
        'phantom unrolled, recomputed': (PhantomGradient(steps, unroll=True), True),
        'unrolled': (UnrolledGradient(steps), False),
        'unrolled, recomputed': (UnrolledGradient(steps), True),
    }


GRADIENTS = tuple(gradients_under_test())


def gradient_of(name, **options):
    return gradients_under_test(**options)[name]


# Models with a contractive map

EXACT = dict(type='BroydenSolver', max_steps=60, tol=1e-13)


def official(backbone):
    """The config of a backbone as the official models have it.

    Args:
        backbone (dict): With ``arch`` as a dict or the name of a preset.
    """
    arch = backbone['arch']
    arch = dict(preset=arch) if isinstance(arch, str) else dict(arch)
    return backbone | dict(arch=arch | dict(injection='first'), out_norm_cfg=None)


def build(cfg):
    init_default_scope('mmpretrain')
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed')
    import mmpretrain.models  # noqa: F401

    return MODELS.build(cfg)


@cache
def project_golden():
    """The project's own golden numbers; made by dev/make_golden.py."""
    golden = torch.load(
        Path(__file__).parent / 'golden' / 'mdeq_tiny.pt', weights_only=True
    )
    # Of a model as the official ones are.
    config = golden['config'] | dict(backbone=official(golden['config']['backbone']))
    return golden | dict(config=config)


def classifier(config, state, **backbone):
    """A classifier in float64, in evaluation mode, that solves exactly.

    Args:
        config (dict): Of the model.
        state (dict): Its weights.
        **backbone: Arguments of MDEQ, in place of those of ``config``.
    """
    exact = dict(solver=EXACT, gradient=dict(type='ImplicitGradient', solver=EXACT))
    model = build(config | dict(backbone=config['backbone'] | exact | backbone))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(k.endswith('num_batches_tracked') for k in missing)
    return model.double().eval()


def project_classifier(**backbone):
    """The classifier of the project's golden numbers."""
    golden = project_golden()
    blank = build(golden['config']).state_dict()
    sizes = [blank[name].numel() for name in golden['names']]
    parts = golden['weights'].split(sizes)
    state = {
        name: part.view_as(blank[name])
        for name, part in zip(golden['names'], parts, strict=True)
    }
    return classifier(golden['config'], state, **backbone)


def write_project_classifier(folder, tol, **checkpoint):
    """Write config and checkpoint of the classifier of the project's golden numbers.

    Args:
        folder (Path): Where to.
        tol (float): Of its evaluation solver, which takes 30 evaluations at most.
        **checkpoint: What the checkpoint holds beside its weights.

    Returns:
        tuple[Path, Path]: Config and checkpoint.
    """
    solver = dict(type='AndersonSolver', max_steps=30, tol=tol)
    model = project_golden()['config']
    model = model | dict(backbone=model['backbone'] | dict(eval_solver=solver))
    config = folder / 'config.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        "custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)\n"
        f'model = {model!r}\n'
        'data_preprocessor = dict(mean=[127.5] * 3, std=[60] * 3)\n'
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]\n"
        "test_dataloader = dict(dataset=dict(type='ImageNet', pipeline=pipeline))\n"
    )
    path = folder / 'model.pth'
    state = project_classifier().float().state_dict()
    torch.save(dict(state_dict=state, **checkpoint), path)
    return config, path


@cache
def official_golden():
    return torch.load(SHARED / 'golden' / 'golden_cls.pt', weights_only=True)


def official_classifier(**backbone):
    """The classifier of the official golden numbers, by way of the converter.

    Returns:
        tuple[nn.Module, dict[str, str]]: The model, and our names of the official
        ones.
    """
    golden = official_golden()
    convert = load_tool('tools/model_converters/mdeq2mm.py').convert
    state, names, left = convert(golden['official_state_dict'], 'cls')
    assert left == []
    config = golden['config']
    channels = config['num_channels']
    model = dict(
        type='ImageClassifier',
        backbone=official(
            dict(
                type='MDEQ',
                arch=dict(
                    channels=channels,
                    num_groups=config['num_groups'],
                    expansion=config['expansion'],
                    downsample_times=config['downsample_times'],
                    post_gn_affine=config['post_gn_affine'],
                    weight_norm=config['weight_norm'],
                ),
            )
        ),
        neck=[
            dict(
                type='MDEQFuseScales',
                in_channels=channels,
                head_channels=config['head_channels'],
                out_channels=config['final_channels'],
            ),
            dict(type='GlobalAveragePooling'),
        ],
        head=dict(
            type='LinearClsHead',
            num_classes=config['num_classes'],
            in_channels=config['final_channels'],
        ),
    )
    return classifier(model, state, **backbone), names


@cache
def official_seg_golden():
    return torch.load(SHARED / 'golden' / 'golden_seg.pt', weights_only=True)


def segmentor_config(channels, classes, **backbone):
    """An mmseg model with the official head; no norm, group or loss is left open."""
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=dict(type='MDEQ', **backbone),
        decode_head=dict(
            type='FCNHead',
            in_channels=list(channels),
            in_index=list(range(len(channels))),
            input_transform='resize_concat',
            channels=sum(channels),
            kernel_size=1,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0,
            num_classes=classes,
            norm_cfg=dict(type='BN'),
            align_corners=True,
            loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
        ),
        test_cfg=dict(mode='whole'),
    )


def build_segmentor(cfg):
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    import mmseg.models  # noqa: F401

    init_default_scope('mmseg')
    return MODELS.build(ConfigDict(cfg))


def official_segmentor(**backbone):
    """The segmentor of the official golden numbers, by way of the converter.

    Returns:
        tuple[nn.Module, dict[str, str]]: The model, and our names of the official
        ones.
    """
    golden = official_seg_golden()
    convert = load_tool('tools/model_converters/mdeq2mm.py').convert
    state, names, left = convert(golden['official_state_dict'], 'seg')
    assert left == []
    config = golden['config']
    arch = dict(channels=config['num_channels']) | {
        key: config[key]
        for key in 'num_groups expansion downsample_times post_gn_affine '
        'weight_norm'.split()
    }
    exact = dict(solver=EXACT, gradient=dict(type='ImplicitGradient', solver=EXACT))
    model = build_segmentor(
        segmentor_config(
            config['num_channels'],
            config['num_classes'],
            **(official(dict(arch=arch)) | exact | backbone),
        )
    ).double()
    # In double precision already, in which the folded bias is.
    model.load_state_dict(state)
    return model.eval(), names


def label_maps(labels):
    """Data samples of mmseg with label maps (N, H, W)."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    return [
        SegDataSample(
            gt_sem_seg=PixelData(data=label[None]),
            metainfo=dict(ori_shape=tuple(label.shape), img_shape=tuple(label.shape)),
        )
        for label in labels
    ]


def logits_of(model, images):
    """What the head of a classifier makes of images, in any mode."""
    return model.head(model.extract_feat(images))


def pack(maps):
    """Maps as one state in the plain memory format, which files may not have."""
    maps = [m.double().contiguous() for m in maps]
    return StateSpec.of(maps).pack(maps)


def equation_of(backbone, images):
    """The equation of a backbone for images, and a state of zeros."""
    with torch.no_grad():
        injections = backbone.inject(images)
        start = backbone._start(injections[0])
        equation = backbone.equilibrium.equation(start, *injections)
    return equation, pack(start)
