"""Importing the package registers its classes and changes nothing else."""

import json
import subprocess
import sys

import pytest

# What a process can observe of itself: printed before and after the import.
STATE = """
import json, locale, logging, multiprocessing, os, pickle, random, signal, sys, warnings
import numpy, torch
import mmengine, mmcv
from mmengine import registry
from mmengine.fileio.backends.registry_utils import backends, prefix_to_backends
from mmengine.registry import DefaultScope
import mmpretrain, mmpretrain.apis, mmpretrain.datasets, mmpretrain.models
import mmpretrain.engine, mmpretrain.evaluation, mmpretrain.visualization
import mmseg.apis, mmseg.datasets, mmseg.models
import mmseg.engine, mmseg.evaluation, mmseg.visualization
import matplotlib

def registries():
    found = {}
    for name in dir(registry):
        root = getattr(registry, name)
        if isinstance(root, registry.Registry):
            found[name] = {k: f'{v.__module__}.{v.__qualname__}'
                           for k, v in root.module_dict.items()}
    return found

def torch_settings():
    return dict(
        threads=torch.get_num_threads(), dtype=str(torch.get_default_dtype()),
        grad=torch.is_grad_enabled(), anomaly=torch.is_anomaly_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        benchmark=torch.backends.cudnn.benchmark,
        tf32=torch.backends.cuda.matmul.allow_tf32,
        precision=torch.get_float32_matmul_precision(),
        safe=sorted(map(str, torch.serialization.get_safe_globals())),
        cuda=torch.cuda.is_initialized(),
        group=torch.distributed.is_initialized(),
        mkldnn=torch.backends.mkldnn.is_available(),
    )

def state():
    return dict(
        environment=dict(os.environ), folder=os.getcwd(), path=sys.path,
        hooks=[str(sys.excepthook), str(sys.displayhook), len(sys.meta_path)],
        filters=[str(f) for f in warnings.filters],
        random=[repr(random.getstate()), repr(numpy.random.get_state()),
                repr(torch.get_rng_state().sum().item())],
        printing=repr(numpy.get_printoptions()), errors=numpy.geterr(),
        torch=torch_settings(), locale=locale.setlocale(locale.LC_ALL),
        level=logging.getLogger().level, handlers=len(logging.getLogger().handlers),
        disabled=logging.root.manager.disable,
        signals=[str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        method=multiprocessing.get_start_method(allow_none=True),
        recursion=sys.getrecursionlimit(), style=dict(matplotlib.rcParams),
        backend=matplotlib.get_backend(),
        scope=str(DefaultScope.get_current_instance()),
        prefixes={k: str(v) for k, v in prefix_to_backends.items()},
        storage={k: str(v) for k, v in backends.items()},
        registries=registries(),
        patched=[str(torch.load), str(torch.save), str(mmengine.runner.Runner.train)],
    )
"""


@pytest.fixture(scope='module')
def states(repo_root):
    """The state of a process before and after the import."""
    code = STATE + (
        f'\nbefore = state()\nsys.path.insert(0, {str(repo_root)!r})\n'
        'import mdeq_mm\nsys.path.pop(0)\nafter = state()\n'
        'print(json.dumps([before, after], default=str))'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *printed, last = done.stdout.splitlines()
    return printed, json.loads(last)


def test_registers_names_and_changes_nothing_else(states):
    printed, (before, after) = states
    assert not [line for line in printed if 'mdeq' in line]
    changed = {name for name in before if before[name] != after[name]}
    # A storage backend is a registered class as any other.
    assert changed == {'registries', 'storage'}
    added = after['storage'].keys() - before['storage'].keys()
    assert added == {'mdeq_mm.atomic'}
    for name, value in before['storage'].items():
        assert after['storage'][name] == value


def test_registers_its_own_classes_alone(states):
    _, (before, after) = states
    for name, old in before['registries'].items():
        new = after['registries'][name]
        # Nothing that was there is replaced.
        assert {key: new[key] for key in old} == old
        for key in new.keys() - old.keys():
            assert new[key].startswith('mdeq_mm.'), (name, key)


def test_public_names_are_registered(states):
    _, (_, after) = states
    names = dict(
        MODELS='MDEQ MDEQFuseScales ImplicitImageClassifier ImplicitEncoderDecoder '
        'MultiTaskMDEQ',
        HOOKS='UnrollWarmupHook JacobianScheduleHook EquilibriumMonitorHook '
        'SolverScheduleHook ExactResumeHook',
        METRICS='EquilibriumMetric',
        OPTIM_WRAPPERS='EquilibriumOptimWrapper AmpEquilibriumOptimWrapper',
    )
    for registry, expected in names.items():
        assert set(expected.split()) <= after['registries'][registry].keys()
