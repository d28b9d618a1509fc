"""The comparison, at a size that shows everything but speed."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdeq_mm.analysis.saved_bytes import saved_bytes
from tests.helpers import load_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = 'tools/analysis_tools/benchmark.py'
OFFICIAL = 'MDEQ, Broyden 27/28, implicit (official limits)'
ANDERSON = 'MDEQ, Anderson(5) 8, phantom 5'
TORCHDEQ = 'torchdeq, Anderson(5) 8, phantom 5'
#: Calls of f in the forward pass (the last one recorded), in the backward pass, and
#: products with its Jacobian (the last one with all tensors).
EXPECTED = {
    OFFICIAL: (27 + 1, 0, 28 + 1),
    'MDEQ, Broyden 8, shared inverse': (8 + 1, 0, 1 + 1),
    f'{ANDERSON}, recomputed': (8 + 1, 1, 4 + 1),
    ANDERSON: (8 + 1, 0, 4 + 1),
    'MDEQ, reversible, 4 steps': (8, 8, 8),
    'MDEQ, unrolled 5': (5, 0, 5),
    TORCHDEQ: (8 + 5, 0, 5),
}
HAS_TORCHDEQ = importlib.util.find_spec('torchdeq') is not None
if not HAS_TORCHDEQ:
    del EXPECTED[TORCHDEQ]
CASES = ['ResNet-50', *EXPECTED]


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    return tmp_path_factory.mktemp('benchmark')


@pytest.fixture(scope='module')
def run(out):
    """What a run prints and writes."""
    command = [
        sys.executable, TOOL, '--size', 'cifar-tiny', '--image', '32', '--threads', '1',
        '--rounds', '1', '--device', 'cpu', '--out', str(out), '--cases', *CASES,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / 'results.json').read_text())


def test_the_table_holds_all_cases_beside_the_reference(run, out):
    printed, found = run
    assert set(found['cases']) == {'ResNet-101', *CASES}
    assert next(iter(found['cases'])) == 'ResNet-101'
    rows = (out / 'results.md').read_text().splitlines()
    widths = {row.count('|') for row in rows if row.startswith('|')}
    assert len(widths) == 1
    for label, result in found['cases'].items():
        (row,) = [row for row in rows if row.startswith(f'| {label} |')]
        assert f'| {result["parameters"] / 1e6:.1f} |' in row
    assert 'ResNet-50' in printed and str(out / 'results.png') in printed
    assert (out / 'results.png').read_bytes().startswith(b'\x89PNG')


def test_ratios_refer_to_resnet_101(run):
    cases = run[1]['cases']
    assert set(cases['ResNet-101']['ratios'].values()) == {1.0}
    for result in cases.values():
        for part, ratio in result['ratios'].items():
            seconds = result['seconds'][part]
            assert ratio * cases['ResNet-101']['seconds'][part] == pytest.approx(
                seconds
            )
        seconds = result['seconds']
        assert seconds['step'] > seconds['forward'] + seconds['backward'] > 0


def test_evaluations_are_what_the_solvers_were_told(run):
    cases = run[1]['cases']
    for label, expected in EXPECTED.items():
        result = cases[label]
        found = tuple(result[k] for k in ('forward', 'again', 'products'))
        assert found == expected, label
    assert cases[OFFICIAL]['evaluations'] == 27
    assert cases[ANDERSON]['evaluations'] <= 8
    assert cases['ResNet-50']['evaluations'] is None


def test_the_weights_are_contractive(run):
    """Residuals fall as they do in trained models, at another size too."""
    cases = run[1]['cases']
    assert run[1]['overhead']['f']['radius'] < 0.9
    assert cases[ANDERSON]['residual'] < 1e-2
    assert cases[OFFICIAL]['residual'] < 1e-5
    if HAS_TORCHDEQ:
        assert cases[TORCHDEQ]['residual'] < 1e-2


def test_known_parameters_and_operations(run):
    cases = run[1]['cases']
    # torchvision's figures; 4.09 G multiplications and additions at 224 pixels.
    assert cases['ResNet-50']['parameters'] == 25_557_032
    assert cases['ResNet-101']['parameters'] == 44_549_160
    assert cases['ResNet-50']['flops'] == pytest.approx(
        2 * 4.087e9 * (32 / 224) ** 2, rel=0.03
    )


@pytest.mark.parametrize('label', ['ResNet-50', ANDERSON, f'{ANDERSON}, recomputed'])
def test_kept_bytes_equal_a_direct_count(run, label):
    load_tool(TOOL)
    cases = importlib.import_module('benchmarking.cases')
    settings = importlib.import_module('benchmarking.settings')
    (case,) = [c for c in cases.all_cases() if c.label == label]
    model = case.build(settings.Settings(**run[1]['settings'])).train()
    images = torch.randn(3, 3, 32, 32)
    kept = [saved_bytes(lambda n=n: model(images[:n], mode='tensor')) for n in (2, 3)]
    assert run[1]['cases'][label]['kept'] == kept[1] - kept[0] > 0


def test_recomputing_keeps_less(run):
    cases = run[1]['cases']
    less = cases[f'{ANDERSON}, recomputed']['kept']
    assert less < 0.5 * cases[ANDERSON]['kept'] < cases['MDEQ, unrolled 5']['kept']


def test_overhead_is_a_ratio_of_times(run):
    overhead = dict(run[1]['overhead'])
    f = overhead.pop('f')['seconds']
    assert [found['evaluations'] for found in overhead.values()] == [8, 8, 28]
    for found in overhead.values():
        expected = found['seconds'] / (found['evaluations'] * f)
        assert found['overhead'] == pytest.approx(expected)


def test_peak_is_above_the_gradients(run):
    for result in run[1]['cases'].values():
        assert result['peak'] > 4 * result['parameters']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--image', '16'], '--image is 16; small and its peers need at least 32'),
        (['--batch', '0'], '--batch is 0; it has to be at least 1'),
        (['--batch', '1', '--image', '32'], 'use --batch 2 or larger images'),
        (['--rounds', '-1'], '--rounds is -1'),
        (['--tol', '-1'], '--tol is -1.0; it has to be 0 or more'),
        (['--device', 'abacus'], '--device abacus cannot be used'),
        (['--cases', 'VGG'], "'VGG' is part of none of the cases: ResNet-101; "),
        (['--weights', 'none.pth'], "the checkpoint 'none.pth' does not exist"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options, message, tmp_path):
    threads = str(torch.get_num_threads())
    tool = load_tool(TOOL)
    with pytest.raises(SystemExit) as error:
        tool.main(['--threads', threads, '--out', str(tmp_path), *options])
    assert message in str(error.value)


def test_without_torchdeq_its_rows_are_left_out(monkeypatch):
    load_tool(TOOL)
    cases = importlib.import_module('benchmarking.cases')
    labels = [c.label for c in cases.choose_cases()]
    monkeypatch.setattr(cases, 'HAS_TORCHDEQ', False)
    left = [c.label for c in cases.choose_cases()]
    assert left == [label for label in labels if not label.startswith('torchdeq')]
    assert len(left) == 14
    with pytest.raises(ValueError, match='torchdeq'):
        cases.choose_cases(['torchdeq'])


def test_weights_of_another_size_are_refused(run, tmp_path):
    path = run[1]['settings']['weights']
    options = ['--size', 'cifar-large', '--weights', path, '--out', str(tmp_path)]
    with pytest.raises(SystemExit, match='the weights cannot be used: '):
        load_tool(TOOL).main(['--threads', str(torch.get_num_threads()), *options])
