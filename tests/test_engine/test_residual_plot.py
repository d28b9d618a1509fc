"""Quantiles of the residuals of many solves."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mdeq_mm.engine.residual_plot import QUANTILES, ResidualPlot
from mdeq_mm.implicit import Solution


class Layer(nn.Module):
    """Gives the traces it is told."""

    trace = False

    def forward(self, trace):
        n = trace.shape[1]
        self.last_solution = Solution(
            torch.zeros(n, 1), torch.zeros(n), torch.zeros(n), torch.zeros(n),
            trace if self.trace else None,
        )  # fmt: skip


@pytest.fixture
def layer():
    return Layer()


def test_samples_that_stopped_keep_their_last_residual(layer):
    plot = ResidualPlot(layer, 100)
    nan = math.nan
    layer(torch.tensor([[1.0, 4.0], [0.5, nan]]))
    layer(torch.tensor([[3.0], [2.0], [1.0]]))
    found = plot.quantiles()
    middle = QUANTILES.index(0.5)
    assert found.shape == (len(QUANTILES), 3)
    np.testing.assert_array_equal(found[middle], [3, 2, 1])
    np.testing.assert_array_equal(found[0], [1, 0.5, 0.5])
    np.testing.assert_array_equal(found[-1], [4, 4, 4])


def test_no_more_samples_than_asked_for(layer):
    plot = ResidualPlot(layer, 5)
    for _ in range(3):
        layer(torch.ones(2, 3))
    assert sum(t.shape[1] for t in plot.traces) == 5
    # Tracing costs a little; it is over.
    assert layer.trace is False


def test_the_layer_is_left_as_it_was(layer):
    plot = ResidualPlot(layer, 5)
    assert layer.trace
    plot.stop()
    assert layer.trace is False
    layer.trace = True
    layer(torch.ones(2, 3))
    assert plot.traces == []


def test_residuals_that_a_logarithm_has_no_place_for(layer):
    plot = ResidualPlot(layer, 5)
    layer(torch.tensor([[math.inf, 1.0], [0.0, 1e-20]]))
    picture = plot.draw('title')
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert (picture < 200).any(2).mean() > 0.01
