"""The models that are compared."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import mmpretrain.models  # noqa: F401  registers the peers
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from mdeq_mm.apis.index import zoo_root
from mdeq_mm.checkpoints import read_checkpoint, state_dict_of
from mdeq_mm.registry import MODELS

from .torchdeq_layer import TorchDEQLayer

MODEL_CONFIGS = zoo_root() / 'configs/_base_/models'
SIZES = {
    'cifar-tiny': 'mdeq_tiny_cifar.py',
    'cifar-large': 'mdeq_large_cifar.py',
    'small': 'mdeq_small.py',
    'large': 'mdeq_large.py',
    'xl': 'mdeq_xl.py',
}
#: What all ratios refer to.
REFERENCE = 'ResNet-101'
HAS_TORCHDEQ = importlib.util.find_spec('torchdeq') is not None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        label (str): Its name.
        group (str): ``'MDEQ'``, ``'torchdeq'`` or ``'mmpretrain'``.
        build (Callable): From :class:`Settings` to a classifier on the CPU.
        quick (bool): Whether it is part of a quick run.
    """

    label: str
    group: str
    build: Callable
    quick: bool = False


def build_classifier(cfg, seed=0):
    """Build an image classifier; one seed always gives the same weights."""
    init_default_scope('mmpretrain')
    torch.manual_seed(seed)
    return MODELS.build(cfg)


def mdeq_config(size):
    """The model of a config file, with PyTorch's usual 1000 classes."""
    model = Config.fromfile(MODEL_CONFIGS / SIZES[size]).model
    model.head.update(num_classes=1000, topk=(1,))
    return model


def load_backbone(backbone, path):
    """Load an MDEQ from a checkpoint of the backbone or of a whole model.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If it is of another architecture.
        ValueError: If it is no checkpoint.
    """
    # mmengine tells where it loads from, each time.
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        state = state_dict_of(read_checkpoint(path))
    finally:
        logger.setLevel(level)
    prefix = 'backbone.'
    if any(key.startswith(prefix) for key in state):
        state = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
    backbone.load_state_dict(state)


def _mdeq(settings, solver, gradient, eval_solver, recompute=False):
    model = mdeq_config(settings.size)
    # Set one by one: update() would merge them with the config's.
    model.backbone.solver = solver
    model.backbone.gradient = gradient
    model.backbone.eval_solver = eval_solver
    model.backbone.with_cp = model.neck[0].with_cp = recompute
    classifier = build_classifier(model)
    if settings.weights:
        load_backbone(classifier.backbone, settings.weights)
    return classifier


def _broyden(steps, tol, memory=None):
    return dict(type='BroydenSolver', max_steps=steps, tol=tol, memory=memory)


def _anderson(steps, tol):
    return dict(type='AndersonSolver', max_steps=steps, tol=tol, memory=5)


def _official(recompute=False):
    # The official tolerance is so small in relative terms that official solves
    # run to their limits, in inference too.
    def build(s):
        gradient = dict(type='ImplicitGradient', solver=_broyden(28, s.tol))
        return _mdeq(s, _broyden(27, s.tol), gradient, _broyden(27, s.tol), recompute)

    return build


def _with_broyden(gradient):
    def build(s):
        return _mdeq(s, _broyden(8, s.tol), gradient(s), _broyden(8, s.eval_tol))

    return build


def _with_anderson(gradient, recompute=False):
    def build(s):
        anderson = _anderson(8, s.tol)
        return _mdeq(s, anderson, gradient, _anderson(8, s.eval_tol), recompute)

    return build


def _phantom(steps):
    return dict(type='PhantomGradient', steps=steps)


def _mdeq_cases():
    reversible = dict(type='ReversibleGradient', steps=4, beta=0.8)
    builders = {
        'Broyden 27/28, implicit (official limits)': _official(),
        'Broyden 27/28, implicit, recomputed': _official(recompute=True),
        'Broyden 8/8, implicit': _with_broyden(
            lambda s: dict(type='ImplicitGradient', solver=_broyden(8, s.tol))
        ),
        'Broyden 8, shared inverse': _with_broyden(
            lambda s: dict(type='SharedInverseGradient', fallback=None)
        ),
        'Anderson(5) 8, phantom 5': _with_anderson(_phantom(5)),
        'Anderson(5) 8, phantom 5, recomputed': _with_anderson(_phantom(5), True),
        'Anderson(5) 8, phantom 3': _with_anderson(_phantom(3)),
        'Anderson(5) 8, Jacobian-free': _with_anderson(_phantom(1)),
        'reversible, 4 steps': _with_anderson(reversible),
        'unrolled 5': _with_anderson(dict(type='UnrolledGradient', steps=5)),
    }
    quick = (
        'Broyden 27/28, implicit (official limits)',
        'Anderson(5) 8, phantom 5, recomputed',
        'reversible, 4 steps',
    )
    return [
        Case(f'MDEQ, {name}', 'MDEQ', build, name in quick)
        for name, build in builders.items()
    ]


def _torchdeq(official=False, **options):
    def build(s):
        classifier = _official()(s)
        backbone = classifier.backbone
        backbone.equilibrium = TorchDEQLayer(
            backbone.equilibrium,
            eval_tol=s.tol if official else s.eval_tol,
            f_tol=s.tol,
            b_tol=s.tol,
            # As of our solvers; its default is the absolute one.
            f_stop_mode='rel',
            b_stop_mode='rel',
            **options,
        )
        return classifier

    return build


def _torchdeq_cases():
    # Its Broyden makes one evaluation before the first of f_max_iter updates.
    broyden = dict(f_solver='broyden', b_solver='broyden', ift=True)
    anderson = dict(f_solver='anderson', solver_kwargs=dict(m=5))
    builders = {
        'Broyden 27/28, implicit (official limits)': _torchdeq(
            official=True, f_max_iter=26, b_max_iter=27, **broyden
        ),
        'Broyden 8/8, implicit': _torchdeq(f_max_iter=7, b_max_iter=7, **broyden),
        'Anderson(5) 8, phantom 5': _torchdeq(f_max_iter=8, grad=5, **anderson),
    }
    return [
        Case(f'torchdeq, {name}', 'torchdeq', build, 'phantom' in name)
        for name, build in builders.items()
    ]


def _peer(config, **backbone):
    def build(settings):
        model = Config.fromfile(MODEL_CONFIGS / config).model
        model.backbone.update(backbone)
        if backbone.get('arch') == 'w48':
            model.neck[0].in_channels = (48, 96, 192, 384)
        return build_classifier(model)

    return build


def all_cases():
    """All rows, in their order.

    Returns:
        list[Case]: The reference first.
    """
    peers = {
        REFERENCE: _peer('resnet101.py'),
        'ResNet-50': _peer('resnet50.py'),
        'HRNet-W18': _peer('hrnet-w18.py'),
        'HRNet-W48': _peer('hrnet-w18.py', arch='w48'),
    }
    return [
        *(Case(k, 'mmpretrain', b, k != 'HRNet-W48') for k, b in peers.items()),
        *_mdeq_cases(),
        *(_torchdeq_cases() if HAS_TORCHDEQ else ()),
    ]


def choose_cases(names=(), quick=False):
    """The rows of a run.

    Args:
        names (Sequence[str]): Parts of labels, in any case of letters; none for
            all.
        quick (bool): Whether to leave out what is slow.

    Returns:
        list[Case]: The reference is always among them.

    Raises:
        ValueError: If a name fits no label.
    """
    cases = [c for c in all_cases() if c.quick or not quick or names]
    for name in names:
        if not any(name.lower() in c.label.lower() for c in cases):
            labels = '; '.join(c.label for c in cases)
            raise ValueError(f'{name!r} is part of none of the cases: {labels}')
    if not names:
        return cases
    return [
        c
        for c in cases
        if c.label == REFERENCE or any(n.lower() in c.label.lower() for n in names)
    ]
