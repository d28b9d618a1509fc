"""Residuals and evaluations as results of an evaluation."""

import math

import pytest

from mdeq_mm.engine import EquilibriumMetric
from mdeq_mm.registry import METRICS


def sample(residual, status, steps):
    return dict(
        equilibrium_residual=residual,
        equilibrium_status=status,
        equilibrium_steps=steps,
    )


def evaluate(samples, size=None, **options):
    metric = METRICS.build(dict(type='EquilibriumMetric', **options))
    for one in samples:
        metric.process({}, [one])
    return metric.evaluate(size or len(samples))


def test_figures():
    found = evaluate(
        [sample(0.1, 'converged', 4), sample(0.3, 'max_steps', 8),
         sample(0.2, 'converged', 6)]
    )  # fmt: skip
    assert found == {
        'equilibrium/residual': 0.2,
        'equilibrium/residual_p95': 0.3,
        'equilibrium/evaluations': 6.0,
        'equilibrium/converged': pytest.approx(200 / 3),
    }


def test_a_residual_may_be_infinite():
    found = evaluate(
        [sample(math.inf, 'diverged', 4)] + [sample(0.1, 'stalled', 4)] * 9
    )
    assert found['equilibrium/residual'] == 0.1
    assert found['equilibrium/residual_p95'] == math.inf
    assert found['equilibrium/converged'] == 0


def test_samples_that_fill_up_the_last_batch_are_left_out():
    samples = [sample(0.1, 'converged', 4)] * 2 + [sample(0.5, 'diverged', 9)]
    found = evaluate(samples, size=2)
    assert found['equilibrium/evaluations'] == 4
    assert found['equilibrium/converged'] == 100


def test_prefix():
    found = evaluate([sample(0.1, 'converged', 4)], prefix='eq')
    assert next(iter(found)) == 'eq/residual'


def test_predictions_that_tell_nothing_are_refused():
    metric = EquilibriumMetric()
    with pytest.raises(ValueError, match='use a model of type ImplicitImageClassifier'):
        metric.process({}, [dict(pred_label=1)])
