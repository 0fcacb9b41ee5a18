"""The rate of training, and the average of its weights."""

import pytest
import torch

from mini.training.loop import Average, rate


def test_the_rate_rises_stays_and_ends_at_zero():
    assert rate(0, 0) < 0.01
    assert rate(0.3, 1000) == 1
    assert rate(0.9, 1000) < rate(0.8, 1000) < 1
    assert rate(1, 1000) == 0


def test_the_average_lags_behind_the_weights():
    layer = torch.nn.Linear(1, 1)
    average = Average({"layer": layer}, 0.9)
    start = average.modules["layer"].weight.item()
    with torch.no_grad():
        layer.weight += 1
    average.update(step=10_000)
    assert average.modules["layer"].weight.item() == pytest.approx(start + 0.1)
