"""The choice of short steps, on changes that are made up."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sd35_trt.calibration.step_extrapolation import held, least_squares, line_over, missed
from sd35_trt.calibration.step_search import best_schedules, full_steps, schedule_of


def made_up(steps: int = 8) -> np.ndarray:
    """Products of changes that turn slowly, and fast at the end."""
    rng = np.random.default_rng(0)
    changes = np.cumsum(rng.normal(size=(steps, 50)) * np.geomspace(0.1, 3, steps)[:, None], 0)
    return changes @ changes.T


def test_a_straight_line_is_missed_by_nothing() -> None:
    times = np.arange(6.0)
    changes = np.outer(times, np.ones(4)) + np.arange(4)
    products = changes @ changes.T
    for rule in (line_over(times), least_squares(products)):
        pair = rule(4, 2, 1)
        assert pair == pytest.approx((3, -2), rel=1e-2)
        assert missed(products, pair, (4, 2, 1)) < 0.01 * products[4, 4] ** 0.5
    assert missed(products, held(4, 2, 1), (4, 2, 1)) == pytest.approx(4.0)


def test_the_search_finds_what_trying_all_finds() -> None:
    products, steps = made_up(), 8
    weights = np.linspace(1, 2, steps)
    rule = least_squares(products)

    def cost(full: tuple[int, ...]) -> float:
        total = 0.0
        for step, pair in enumerate(schedule_of(full, steps, rule)):
            if pair is not None:
                before = [other for other in full if other < step]
                total += weights[step] * missed(products, pair, (step, before[-1], before[-2]))
        return total

    found = best_schedules(products, weights, rule)
    assert sorted(found) == list(range(2, steps))
    for count, schedule in found.items():
        every = [(0, 1, *rest) for rest in combinations(range(2, steps), count - 2)]
        assert cost(full_steps(schedule)) == pytest.approx(min(map(cost, every)))


def test_equal_changes_have_coefficients_within_bounds() -> None:
    products = np.ones((4, 4))
    assert sum(least_squares(products)(3, 1, 0)) == pytest.approx(1.0, rel=1e-3)
