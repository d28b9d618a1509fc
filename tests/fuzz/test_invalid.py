"""Valid configurations with exactly one fault: each is refused, with a sentence."""

import copy
import math
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mdeq_mm.engine.hooks import (
    EquilibriumMonitorHook,
    JacobianScheduleHook,
    SolverScheduleHook,
    UnrollWarmupHook,
)
from mdeq_mm.engine.metrics import EquilibriumMetric
from mdeq_mm.engine.optim_wrappers import EquilibriumOptimWrapper
from mdeq_mm.implicit.gradients import build_gradient
from mdeq_mm.implicit.solvers import build_solver
from mdeq_mm.models import MDEQ, MDEQFuseScales
from tests.fuzz import strategies as fuzz

FAST, SLOW = 2, 12

#: In place of a value: the field is left out.
GONE = object()


@dataclass(frozen=True)
class Fault:
    """One field, and values that it cannot have.

    Attributes:
        values (SearchStrategy): Of the field, each of them wrong; or functions from
            the valid configuration to such a value.
        names (str): What the message has to name.
        tells (bool): Whether the message has to hold the value.
        also (dict): Fields that are set beside it, which is no fault in itself.
    """

    values: Any
    names: str
    tells: bool = True
    also: dict = field(default_factory=dict)


# Values that are wrong for every field of a kind

_ODD = (math.nan, math.inf, -math.inf, '', 'three', [], [2], {}, 2j)


def one_of(*values):
    return st.sampled_from(values)


def integer(least, optional=False):
    values = [1.5, 2.0, True, False, '3', *_ODD, *([] if optional else [None])]
    return st.integers(least - 1000, least - 1) | one_of(*values)


def amount(optional=False):
    values = [True, False, '0.5', *_ODD, *([] if optional else [None])]
    return st.floats(-1e6, -1e-6) | one_of(-1, *values)


def share(optional=False, zero=False):
    """Outside of (0, 1], or of [0, 1) where zero is taken."""
    values = [True, False, '0.5', *_ODD, *([] if optional else [None])]
    edge = 1.0 if zero else 0.0
    beyond = st.floats(1.001, 1e6) | st.floats(-1e6, -0.001)
    return beyond | one_of(edge, -1, 2, *values)


def flag(optional=False):
    return one_of(1, 0, 1.0, 'no', 'True', *_ODD, *([] if optional else [None]))


def text(optional=False):
    values = [3, True, math.nan, [], ['rel'], {}, *([] if optional else [None])]
    return one_of('nope', '', *values)


def config(optional=False):
    """No dict with a known type."""
    values = [3, True, 'BroydenSolver', '', [], {}, dict(max_steps=3)]
    return one_of(*values, *([] if optional else [None]))


def kind():
    return one_of('nope', '', None, 3, True, [], dict)


# Faults by component: how it is built, its valid configurations, its fields


def solver_faults(prefix):
    return {
        'max_steps': Fault(integer(1), f'{prefix}max_steps'),
        'tol': Fault(amount(), f'{prefix}tol'),
        'norm': Fault(text(), f'{prefix}norm'),
        'drop_finished': Fault(flag(optional=True), f'{prefix}drop_finished'),
        'check_every': Fault(integer(1), f'{prefix}check_every'),
        'type': Fault(kind(), f'{prefix}type'),
        'maxsteps': Fault(st.just(30), 'maxsteps', tells=False),
    }


def backward_faults(prefix):
    """Of a solver that serves the backward pass."""
    return solver_faults(prefix) | {
        'norm (absolute)': Fault(st.just('abs'), f'{prefix}norm'),
        'drop_finished (set)': Fault(st.just(True), f'{prefix}drop_finished'),
    }


def below(name, faults):
    """Faults one level further down."""
    return {f'{name}.{key}': fault for key, fault in faults.items()}


def solver(kind):
    limits = dict(max_steps=st.integers(1, 30), tol=st.floats(0, 1))
    return kind(**limits)


def too_many_steps(cfg):
    digits = math.log10(1 / (1 - cfg['beta']))
    return int(9 / digits) + 1


STEPS = Fault(integer(1), 'gradient.steps')
DAMPING = Fault(share(), 'gradient.damping')
BACKWARD = st.builds(
    dict, type=st.just('ImplicitGradient'), solver=solver(fuzz.broyden)
)
SHINE = st.builds(
    dict, type=st.just('SharedInverseGradient'), fallback=solver(fuzz.anderson)
)

ELEMENT = integer(1)


def arch_element(i):
    """A list of channels in which one entry is wrong."""

    def broken(value):
        def change(cfg):
            channels = list(cfg['arch']['channels'])
            channels[i] = value
            return channels

        return change

    return ELEMENT.map(broken)


def width_of(arch):
    return len(arch['channels'])


ARCH = {
    'channels': Fault(
        one_of(8, '88', '', None, math.nan, {}, True, 4.0), 'arch.channels'
    ),
    'channels (entry)': Fault(arch_element(1), 'arch.channels[1]', tells=False),
    'channels (few)': Fault(one_of([], [4], (8,)), 'arch.channels'),
    'channels (none)': Fault(st.just(GONE), 'channels', tells=False),
    'num_blocks': Fault(one_of(2, '11', {}, True, 1.0), 'arch.num_blocks'),
    'num_blocks (entry)': Fault(
        ELEMENT.map(lambda v: lambda cfg: [v] * width_of(cfg['arch'])),
        'arch.num_blocks[0]',
        tells=False,
    ),
    'num_blocks (length)': Fault(
        one_of(-1, 1).map(lambda d: lambda cfg: [1] * (width_of(cfg['arch']) + d)),
        'arch.num_blocks',
    ),
    'num_groups': Fault(integer(2), 'arch.num_groups'),
    'num_groups (odd)': Fault(one_of(3, 5, 7), 'arch.num_groups'),
    'num_groups (divides not)': Fault(
        st.just(lambda cfg: 2 * max(cfg['arch']['channels'])), 'arch.num_groups'
    ),
    'expansion': Fault(integer(1), 'arch.expansion'),
    'dropout': Fault(share(zero=True), 'arch.dropout'),
    'injection': Fault(
        one_of('last', 'ALL', '', None, 3, True, [], ['all'], {}), 'arch.injection'
    ),
    'preset': Fault(one_of('medium', '', 3, True, [], ['xl'], {}), 'arch'),
    'downsample_times': Fault(integer(0), 'arch.downsample_times'),
    'post_gn_affine': Fault(flag(), 'arch.post_gn_affine'),
    'weight_norm': Fault(flag(), 'arch.weight_norm'),
    'num_channels': Fault(st.just([8, 8]), 'num_channels', tells=False),
    3: Fault(st.just(8), '3', tells=False),
}

NORM = one_of(
    'BN', '', 3, True, [], {}, dict(num_groups=2), dict(type='nope'), dict(type=None),
    dict(type='GN', num_groups=999), dict(type='GN'), dict(type='BN', groups=2),
)  # fmt: skip
INIT = one_of(3, True, 'Normal', {}, [3], ['Normal'], dict(std=0.01), [{}])

MODEL = {
    'arch': Fault(one_of(None, 3, True, 'medium', '', [], ['small']), 'arch'),
    'arch (empty)': Fault(st.just({}), "'channels'", tells=False),
    'in_channels': Fault(integer(1), 'in_channels'),
    'out_indices': Fault(
        one_of(9, -1, True, 1.5, math.nan, [], (), '', {}, {0: 1}), 'out_indices'
    ),
    'out_indices (entry)': Fault(
        one_of([0, 9], [-1], [True], [0.0], [math.nan], [None], '01', [[0]]),
        'out_indices',
        tells=False,
    ),
    'drop_rate': Fault(share(optional=True, zero=True), 'drop_rate'),
    'norm_cfg': Fault(NORM, 'norm_cfg'),
    'out_norm_cfg': Fault(NORM, 'out_norm_cfg'),
    'norm_eval': Fault(flag(), 'norm_eval'),
    'with_cp': Fault(flag(), 'with_cp'),
    'warm_start': Fault(flag(), 'warm_start'),
    'frozen_stages': Fault(
        one_of(-2, 3, 1.5, 1.0, True, False, None, '0', *_ODD), 'frozen_stages'
    ),
    'pretrained': Fault(one_of(3, True, [], {}, 0.5), 'pretrained'),
    'pretrained (twice)': Fault(
        st.just('a.pth'), 'init_cfg', also=dict(init_cfg=dict(type='Normal'))
    ),
    'init_cfg': Fault(INIT, 'init_cfg'),
    'solver': Fault(config(), 'solver'),
    'eval_solver': Fault(config(optional=True), 'eval_solver'),
    'gradient': Fault(config(), 'gradient'),
    'gradient (solver)': Fault(
        st.just(dict(type='SharedInverseGradient')),
        'SharedInverseGradient',
        tells=False,
        also=dict(solver=dict(type='AndersonSolver')),
    ),
    'stages': Fault(st.just(3), 'stages', tells=False),
}
MODEL |= below('arch', ARCH)
MODEL |= below('solver', solver_faults('solver.'))
MODEL |= below('eval_solver', solver_faults('eval_solver.'))
MODEL |= below('gradient', below('solver', backward_faults('gradient.solver.')))


@st.composite
def models(draw):
    arch = draw(fuzz.arches())
    return dict(
        arch=arch,
        in_channels=draw(st.integers(1, 4)),
        solver=draw(solver(fuzz.broyden)),
        eval_solver=draw(solver(fuzz.picard)),
        gradient=draw(BACKWARD),
    )


@st.composite
def necks(draw):
    branches = draw(st.integers(1, 3))
    widths = st.lists(st.integers(1, 4), min_size=branches, max_size=branches)
    return dict(
        in_channels=draw(widths),
        head_channels=draw(widths | widths.map(tuple)),
        out_channels=draw(st.integers(1, 6)),
        expansion=draw(st.integers(1, 3)),
        with_cp=draw(st.booleans()),
    )


def longer(name):
    return st.just(lambda cfg: [*cfg[name], 4])


def with_entry(name):
    return ELEMENT.map(lambda v: lambda cfg: [v, *cfg[name][1:]])


NECK = {
    'in_channels (longer)': Fault(longer('in_channels'), 'in_channels'),
    'head_channels (longer)': Fault(longer('head_channels'), 'head_channels'),
    'in_channels': Fault(one_of(4, '44', None, {}, math.nan, True), 'in_channels'),
    'in_channels (entry)': Fault(with_entry('in_channels'), 'in_channels', tells=False),
    'in_channels (empty)': Fault(
        st.just([]), 'in_channels', also=dict(head_channels=[])
    ),
    'head_channels': Fault(one_of(4, '44', None, {}, True), 'head_channels'),
    'head_channels (entry)': Fault(
        with_entry('head_channels'), 'head_channels', tells=False
    ),
    'out_channels': Fault(integer(1), 'out_channels'),
    'expansion': Fault(integer(1), 'expansion'),
    'norm_cfg': Fault(NORM | st.none(), 'norm_cfg'),
    'with_cp': Fault(flag(), 'with_cp'),
    'init_cfg': Fault(INIT, 'init_cfg'),
}


def milestones(**faulty):
    """A list whose last entry has the fault."""
    first = dict(begin=0, solver=dict(max_steps=5))
    return [first, dict(begin=9, solver=dict(max_steps=8, tol=1e-3)) | faulty]


def milestone(name, inside=None):
    wrap = (lambda v: v) if inside is None else (lambda v: {inside: v})
    return lambda v: milestones(**{name: wrap(v)})


MILESTONE = 'SolverScheduleHook.milestones[1]'

GRADIENT = {
    'ImplicitGradient': (
        BACKWARD,
        {
            'solver': Fault(config(optional=True), 'gradient.solver'),
            'warm_start': Fault(flag(), 'gradient.warm_start'),
            'max_steps': Fault(st.just(3), 'max_steps', tells=False),
            'type': Fault(kind(), 'gradient.type'),
        }
        | below('solver', backward_faults('gradient.solver.')),
    ),
    'PhantomGradient': (
        fuzz.phantom(),
        {
            'steps': STEPS,
            'damping': DAMPING,
            'unroll': Fault(flag(), 'gradient.unroll'),
            'solver': Fault(st.just(dict(type='PicardSolver')), 'solver', tells=False),
            3: Fault(st.just(3), '3', tells=False),
        },
    ),
    'UnrolledGradient': (fuzz.unrolled(), {'steps': STEPS, 'damping': DAMPING}),
    'ReversibleGradient': (
        fuzz.reversible(),
        {
            'steps': STEPS,
            'steps (many)': Fault(st.just(too_many_steps), 'gradient.steps'),
            'beta': Fault(share() | st.just(1.0), 'gradient.beta'),
            'beta (near one)': Fault(st.floats(1 - 1e-12, 1, exclude_max=True), 'beta'),
        },
    ),
    'SharedInverseGradient': (
        SHINE,
        {
            'limit': Fault(share(), 'gradient.limit'),
            'fallback': Fault(config(optional=True), 'gradient.fallback'),
        }
        | below('fallback', backward_faults('gradient.fallback.')),
    ),
}


def wrapper(cfg):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return EquilibriumOptimWrapper(optimizer=optimizer, **cfg)


def built(cls):
    return lambda cfg: cls(**cfg)


def hook_faults(cls, **faults):
    """Fields that messages name behind the class."""
    return {
        key: Fault(values, f'{cls.__name__}.{key.partition(" ")[0]}')
        for key, values in faults.items()
    }


#: Name: how it is built, valid configurations, faults.
COMPONENTS = {
    'MDEQ': (built(MDEQ), models(), MODEL),
    'MDEQFuseScales': (built(MDEQFuseScales), necks(), NECK),
    'PicardSolver': (
        build_solver,
        solver(fuzz.picard),
        solver_faults('solver.') | {'damping': Fault(share(), 'solver.damping')},
    ),
    'AndersonSolver': (
        build_solver,
        solver(fuzz.anderson),
        solver_faults('solver.')
        | {
            'memory': Fault(integer(1), 'solver.memory'),
            'ridge': Fault(share(), 'solver.ridge'),
            'mixing': Fault(share(), 'solver.mixing'),
        },
    ),
    'BroydenSolver': (
        build_solver,
        solver(fuzz.broyden),
        solver_faults('solver.')
        | {'memory': Fault(integer(1, optional=True), 'solver.memory')},
    ),
    **{
        name: (build_gradient, configs, faults)
        for name, (configs, faults) in GRADIENT.items()
    },
    'UnrollWarmupHook': (
        built(UnrollWarmupHook),
        st.builds(dict, unroll_steps=st.integers(1, 9), end=st.integers(1, 99)),
        hook_faults(
            UnrollWarmupHook,
            unroll_steps=integer(1),
            end=integer(0),
            by_epoch=flag(),
            threshold=amount(optional=True) | st.just(0),
            interval=integer(1),
            readings=integer(1),
        )
        | {'end (threshold)': Fault(st.just(0), 'threshold', also=dict(threshold=0.1))},
    ),
    'JacobianScheduleHook': (
        built(JacobianScheduleHook),
        st.builds(dict, weight=st.floats(0, 9), begin=st.integers(0, 9)),
        hook_faults(
            JacobianScheduleHook,
            weight=amount(),
            frequency=share(),
            probes=integer(1),
            warmup_weight=amount(optional=True),
            increment=amount(),
            increment_every=integer(1),
            begin=integer(0),
            end=integer(1, optional=True),
            by_epoch=flag(),
        )
        | {
            'end (before begin)': Fault(
                st.just(lambda cfg: cfg['begin']), 'JacobianScheduleHook.end'
            )
        },
    ),
    'SolverScheduleHook': (
        built(SolverScheduleHook),
        st.just(dict(milestones=milestones())),
        hook_faults(
            SolverScheduleHook,
            milestones=one_of([], (), {}, None, 3, 'x', True, dict(begin=0)),
            by_epoch=flag(),
        )
        | {
            'milestones (entry)': Fault(
                one_of(3, None, 'begin', [], {}).map(lambda v: [v]),
                'SolverScheduleHook.milestones[0]',
                tells=False,
            ),
            'milestones (order)': Fault(
                one_of(0, 9).map(lambda b: [*milestones(), dict(begin=b)]),
                'SolverScheduleHook.milestones',
                tells=False,
            ),
            'milestones (begin)': Fault(
                integer(0).map(milestone('begin')), f'{MILESTONE}.begin', tells=False
            ),
            'milestones (key)': Fault(
                st.just(milestones(solvers={})), MILESTONE, tells=False
            ),
            'milestones (number)': Fault(
                st.just([dict(begin=0) | {3: 4, 'x': 5}]), '3', tells=False
            ),
            'milestones (solver)': Fault(
                one_of(3, None, 'x', []).map(milestone('solver')),
                f'{MILESTONE}.solver',
                tells=False,
            ),
            'milestones (gradient)': Fault(
                one_of(3, None, 'x', []).map(milestone('gradient')),
                f'{MILESTONE}.gradient',
                tells=False,
            ),
            'milestones (max_steps)': Fault(
                integer(1).map(milestone('solver', 'max_steps')),
                f'{MILESTONE}.solver.max_steps',
                tells=False,
            ),
            'milestones (tol)': Fault(
                amount().map(milestone('gradient', 'tol')),
                f'{MILESTONE}.gradient.tol',
                tells=False,
            ),
            'milestones (memory)': Fault(
                st.just(milestones(solver=dict(memory=4))), "'memory'", tells=False
            ),
        },
    ),
    'EquilibriumMonitorHook': (
        built(EquilibriumMonitorHook),
        st.builds(dict, interval=st.integers(1, 9)),
        hook_faults(
            EquilibriumMonitorHook,
            interval=integer(1),
            radius_interval=integer(0),
            radius_iterations=integer(2),
            plot_samples=integer(0),
        ),
    ),
    'EquilibriumOptimWrapper': (
        wrapper,
        st.builds(dict, policy=one_of('warn', 'skip', 'stop')),
        hook_faults(
            EquilibriumOptimWrapper,
            policy=text(),
            limit=amount(optional=True) | st.just(0),
            max_skips=integer(0) | st.just(1000),
            window=integer(1) | st.just(20),
            warn_interval=integer(1),
        ),
    ),
    'EquilibriumMetric': (
        built(EquilibriumMetric),
        st.builds(dict, collect_device=one_of('cpu', 'gpu')),
        {
            'collect_device': Fault(text(), 'collect_device'),
            'prefix': Fault(one_of(3, True, [], ['a'], {}, 0.5), 'prefix'),
        },
    ),
}


def with_fault(cfg, path, value, also):
    """A copy of a configuration with one field replaced, added or left out."""
    cfg = copy.deepcopy(cfg) | also
    if callable(value) and not isinstance(value, type):
        value = value(cfg)
    *above, last = path
    inside = cfg
    for key in above:
        inside = inside[key]
    if value is GONE:
        del inside[last]
    else:
        inside[last] = value
    return cfg, value


def path_of(name):
    """Keys of a field: 'solver.norm (absolute)' is at solver, norm."""
    if not isinstance(name, str):
        return [name]
    *above, last = name.partition(' (')[0].split('.')
    return [*above, int(last) if last.isdigit() else last]


def check_refusal(build, cfg, fault, value):
    """The error is of the right kind, and its message one useful sentence."""
    try:
        result = build(cfg)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        raise AssertionError(f'{cfg} was taken, as {result!r:.200}')
    assert fault.names in message, message
    assert '\n' not in message
    assert not re.search(r'[.!?] [A-Z]', message), message
    assert len(message.split()) >= 4, message
    if fault.tells:
        # Sequences are shown as lists.
        plain = list(value) if isinstance(value, tuple) else value
        shown = (repr(value), str(value), repr(plain))
        assert any(text and text in message for text in shown), message


both = pytest.mark.parametrize(
    'count',
    [FAST, pytest.param(SLOW, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)


def examples(count):
    return settings(
        max_examples=count,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


def refusals(build, configs, key, fault, count):
    """Break a field in up to ``count`` ways; the number of those tried."""
    refused = []

    @examples(count)
    @given(configs, fault.values)
    def check(cfg, value):
        if not refused:
            # What is broken has to work before.
            build(copy.deepcopy(cfg))
        cfg, value = with_fault(cfg, path_of(key), value, fault.also)
        check_refusal(build, cfg, fault, value)
        refused.append(value)

    check()
    return len(refused)


@both
@pytest.mark.parametrize('name', list(COMPONENTS))
def test_faults_are_refused(name, count):
    build, configs, faults = COMPONENTS[name]
    refused = [refusals(build, configs, *fault, count) for fault in faults.items()]
    assert min(refused) >= 1


#: What the shape of valid images (N, C, H, W) is turned into, and a word on it.
SHAPES = {
    'empty': (lambda n, c, h, w, least: (n, c, 0, 0), 'too small'),
    'one image': (lambda n, c, h, w, least: (c, h, w), 'in_channels'),
    'video': (lambda n, c, h, w, least: (n, 1, c, h, w), 'in_channels'),
    'more channels': (lambda n, c, h, w, least: (n, c + 1, h, w), 'in_channels'),
    'no channels': (lambda n, c, h, w, least: (n, 0, h, w), 'in_channels'),
    'channels last': (lambda n, c, h, w, least: (n, h, w, c), 'in_channels'),
    'integers': (lambda n, c, h, w, least: (n, c, h, w), 'floating-point'),
}


@both
def test_images_are_refused(count):
    seen = []

    @examples(10 * count)
    @given(fuzz.arches(), st.integers(1, 3), st.data())
    def check(arch, batch, data):
        size = data.draw(fuzz.sizes(arch))
        name = data.draw(st.sampled_from(sorted(SHAPES)))
        change, word = SHAPES[name]
        model = MDEQ(arch=arch, in_channels=1).eval()
        shape = change(batch, 1, *size, model.arch.min_size)
        dtype = torch.uint8 if name == 'integers' else torch.float32
        with pytest.raises((TypeError, ValueError), match=word) as caught:
            model(torch.zeros(shape, dtype=dtype))
        assert '\n' not in str(caught.value)
        seen.append(name)

    check()
    assert len(set(seen)) > len(SHAPES) / 2


def test_norm_of_a_single_number():
    arch = dict(channels=[4, 8], num_groups=4, downsample_times=1)
    model = MDEQ(arch=arch)
    for batch in (1, 2):
        with pytest.raises(ValueError, match=r'4x4 pixels .* more than 4 a side'):
            model(torch.zeros(batch, 3, 4, 4))
        maps = model(torch.rand(batch, 3, 4, 5))
        assert all(m.isfinite().all() for m in maps)


@both
def test_number_of_maps_is_checked(count):
    @examples(count)
    @given(necks(), st.integers(1, 5))
    def check(cfg, given):
        neck, branches = MDEQFuseScales(**cfg), len(cfg['in_channels'])
        given += given >= branches
        maps = [torch.zeros(1, 4, 4, 4)] * given
        with pytest.raises(ValueError, match=f'got {given} maps for {branches}'):
            neck(maps)

    check()
