"""What MDEQ-small keeps for the backward pass, at its real size; what a batch costs."""

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch.nn.modules.batchnorm import _BatchNorm

from mdeq_mm.analysis.saved_bytes import saved_bytes, saved_bytes_per_image
from mdeq_mm.models import MDEQ
from tests.helpers import ROOT, build, logits_of, project_classifier, relative

MB = 1e6
#: Bytes of one state at 224 pixels a side, in single precision.
STATE = 4 * (56**2 * 32 + 28**2 * 64 + 14**2 * 128 + 7**2 * 256)

IMPLICIT = dict(
    type='ImplicitGradient', solver=dict(type='BroydenSolver', max_steps=4, tol=0)
)
PHANTOM = dict(type='PhantomGradient', steps=3)
REVERSIBLE = dict(type='ReversibleGradient', steps=2)


@cache
def config():
    path = ROOT / 'configs/imagenet/mdeq-small_4xb32-100e_in1k.py'
    return Config.fromfile(path).to_dict()['model']


def model_of(gradient=PHANTOM, again=False, **backbone):
    """MDEQ-small with few steps, in training mode.

    Args:
        gradient (dict): Of the backbone.
        again (bool): Whether backbone and neck are evaluated again.
        **backbone: Further arguments of the backbone.
    """
    cfg = copy.deepcopy(config())
    cfg['backbone'].update(
        solver=dict(type='AndersonSolver', max_steps=2, tol=0),
        gradient=gradient,
        with_cp=again,
        **backbone,
    )
    cfg['neck'][0]['with_cp'] = again
    return build(cfg).train()


def kept(model, part='whole'):
    images = torch.randn(2, 3, 224, 224)

    def forward(n):
        if part == 'backbone':
            return model.backbone(images[:n])
        return logits_of(model, images[:n])

    return saved_bytes_per_image(forward, (1, 2))


class TestAtTheRealSize:
    """Bytes an image of 224x224 pixels."""

    @pytest.mark.parametrize(
        'gradient', [IMPLICIT, PHANTOM], ids=['implicit', 'phantom']
    )
    def test_of_the_backbone(self, gradient):
        plain = kept(model_of(gradient), 'backbone')
        again = kept(model_of(gradient, again=True), 'backbone')
        assert again <= 8 * MB < plain
        # f, 17 times its state, gave way to nothing: its inputs are kept in any case.
        assert plain - again > 15 * STATE

    def test_of_the_backbone_with_the_reversible_gradient(self):
        found = kept(model_of(REVERSIBLE), 'backbone')
        # The official model's 10 MB, and what the output norms keep.
        assert found <= 10 * MB + STATE
        # Two states in double precision and the start, in place of the solution.
        again = kept(model_of(again=True), 'backbone')
        assert found - again == 4 * STATE

    @pytest.mark.parametrize(
        'gradient',
        [IMPLICIT, PHANTOM, REVERSIBLE],
        ids=['implicit', 'phantom', 'reversible'],
    )
    def test_of_the_whole_model(self, gradient):
        assert kept(model_of(gradient, again=True)) <= 12 * MB

    @pytest.mark.parametrize(
        'gradient', [IMPLICIT, PHANTOM], ids=['implicit', 'phantom']
    )
    def test_of_the_whole_model_without_recomputation(self, gradient):
        # The official model's 33 MB, and what output norms and injections keep.
        assert 24 * MB < kept(model_of(gradient)) <= 33 * MB + 2 * STATE

    def test_statistics_are_updated_once(self):
        plain, again = model_of(), model_of(again=True)
        again.load_state_dict(plain.state_dict())
        images = torch.randn(2, 3, 224, 224)
        for model in (plain, again):
            logits_of(model, images).square().mean().backward()
        norms = {k: m for k, m in plain.named_modules() if isinstance(m, _BatchNorm)}
        # Stem, injection and outputs; neck: three of each bottleneck and its shortcut
        # where the widths differ, one of each convolution; pooled features.
        assert len(norms) == 2 + 4 + 4 + 4 * (3 + 1) + 3 + 1 + 1
        for name, norm in norms.items():
            other = again.get_submodule(name)
            assert norm.num_batches_tracked == other.num_batches_tracked == 1, name
            assert not norm.running_mean.eq(0).all(), name
            for key in ('running_mean', 'running_var'):
                torch.testing.assert_close(
                    getattr(other, key), getattr(norm, key), rtol=1e-6, atol=1e-7
                )


@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('gradient', [IMPLICIT, PHANTOM], ids=['implicit', 'phantom'])
@pytest.mark.parametrize('solver', ['AndersonSolver', 'BroydenSolver'])
def test_constant_from_5_to_50_steps(solver, gradient, again):
    images = torch.randn(2, 3, 64, 64)
    found = set()
    for steps in (5, 50):
        backbone = MDEQ(
            'small',
            solver=dict(type=solver, max_steps=steps, tol=0),
            gradient=gradient,
            with_cp=again,
        ).train()
        found.add(saved_bytes(lambda model=backbone: model(images)))
        assert backbone.last_solution.steps.tolist() == [steps] * 2
    assert len(found) == 1


def test_constant_over_the_reversible_steps():
    images = torch.randn(2, 3, 64, 64)
    found = set()
    # 29 is as many as beta allows.
    for steps in (5, 29):
        gradient = dict(type='ReversibleGradient', steps=steps, beta=0.5)
        backbone = MDEQ('small', gradient=gradient).train()
        found.add(saved_bytes(lambda model=backbone: model(images)))
        assert backbone.last_solution.steps.tolist() == [2 * steps] * 2
    assert len(found) == 1


def contractive(model):
    """Weights with which f has an equilibrium, and is not zero at zero."""
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, torch.nn.GroupNorm) and module.affine:
                module.weight.fill_(0.3)
                module.bias.normal_(0, 0.3)
    return model


def gradients(model, images, half):
    """Of all parameters, after the same seed."""
    torch.manual_seed(5)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        logits = logits_of(model, images)
    logits.float().log_softmax(1)[:, 3].sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize('half', [False, True], ids=['single', 'autocast'])
@pytest.mark.parametrize(
    'gradient',
    [IMPLICIT, PHANTOM, REVERSIBLE],
    ids=['implicit', 'phantom', 'reversible'],
)
def test_same_gradients_with_and_without_recomputation(gradient, half):
    plain = contractive(model_of(gradient, drop_rate=0.2))
    again = model_of(gradient, again=True, drop_rate=0.2)
    again.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 64, 64)
    logits, expected = gradients(plain, images, half)
    logits2, found = gradients(again, images, half)
    assert plain.backbone.last_solution.residual.lt(0.9).all()
    assert relative(logits2.float(), logits.float()) < 1e-5
    assert relative(found, expected) < 1e-5
    # Dropout is on: without it, the gradients are others.
    undropped = model_of(gradient)
    undropped.load_state_dict(again.state_dict())
    assert relative(gradients(undropped, images, half)[1], expected) > 1e-2


# Memory of the process

MEASURE = """
import ctypes, gc, json, sys
import torch
from tests import test_memory_claims as claims

torch.set_num_threads(1)
gradient, again = json.loads(sys.argv[1])
torch.manual_seed(0)
model = claims.model_of(gradient, again)
images = torch.randn(4, 3, 224, 224)

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in open('/proc/self/status'):
        if line.startswith('VmRSS'):
            return int(line.split()[1]) * 1024

def forward(n):
    return claims.logits_of(model, images[:n])

hooks = claims.saved_bytes_per_image(forward, (2, 4))
forward(4)
grown = []
for n in (2, 4):
    model.backbone.equilibrium.last_solution = None
    before = resident()
    held = forward(n)
    grown.append(resident() - before)
    del held
print(json.dumps([hooks, (grown[1] - grown[0]) / 2]))
"""


def resident_per_image(gradient, again):
    """Bytes an image that a process holds after the forward pass.

    Returns:
        tuple[float, float]: As the hooks count them, and as the system does.
    """
    # Every large tensor is mapped by itself and given back when it is freed.
    quiet = dict(MALLOC_ARENA_MAX='1', MALLOC_MMAP_THRESHOLD_='65536')
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, json.dumps([gradient, again])],
        cwd=ROOT,
        env=os.environ | quiet | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(
    not (sys.platform == 'linux' and Path('/proc/self/status').exists()),
    reason='memory of a process is read from /proc',
)
class TestTheProcessAgrees:
    """Nothing is kept that the hooks cannot see."""

    @pytest.mark.parametrize(
        ('gradient', 'again', 'limit'),
        [
            (IMPLICIT, False, 33),
            (IMPLICIT, True, 12),
            (PHANTOM, True, 12),
            (REVERSIBLE, True, 12),
        ],
    )
    def test_resident_memory(self, gradient, again, limit):
        hooks, system = resident_per_image(gradient, again)
        # The solution itself may be held beside what the hooks see.
        assert hooks - 0.05 * MB < system <= 1.02 * hooks + STATE
        assert system <= limit * MB


# What a batch costs


class TestABatchCostsTheSumOfItsSamples:
    def solve(self, training=False, **options):
        """Rows that pass through f, call by call, and the steps of the samples."""
        solver = dict(type='AndersonSolver', max_steps=60, tol=1e-6) | options
        backbone = project_classifier(solver=solver, norm_eval=True).backbone
        backbone.train(training)
        images = torch.randn(1, 3, 30, 23).double()
        # Scaled inputs: their equilibria are found after different numbers of steps.
        scales = torch.tensor([0.01, 0.3, 1, 5, 100]).double()[:, None, None, None]
        rows = []
        layer = backbone.equilibrium
        make = layer.equation

        def counted(*args, **kwargs):
            equation = make(*args, **kwargs)
            function = equation.function

            def count(z, tensors):
                rows.append(len(z))
                return function(z, tensors)

            equation.function = count
            return equation

        layer.equation = counted
        with torch.set_grad_enabled(training):
            backbone(images * scales)
        return rows, backbone.last_solution.steps

    def test_in_evaluation_by_default(self):
        rows, steps = self.solve()
        assert steps.unique().numel() >= 3
        assert steps.max() < 60
        assert sum(rows) == steps.sum()
        assert len(rows) == steps.max()

    def test_where_samples_stay(self):
        rows, steps = self.solve(drop_finished=False)
        assert steps.unique().numel() >= 3
        assert rows == [5] * steps.max().item()

    def test_in_training(self):
        """Samples stay, and f is recorded once at the equilibrium."""
        rows, steps = self.solve(training=True)
        assert steps.unique().numel() >= 3
        assert rows == [5] * (steps.max().item() + 1)
        rows, steps = self.solve(training=True, drop_finished=True)
        assert sum(rows) == steps.sum() + 5
