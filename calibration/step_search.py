"""Which steps to make short: the best choice for each number of full ones, by an estimate."""

from __future__ import annotations

import numpy as np

from sd35_trt.formats.step_cache import FIRST_STEPS, Coefficients

from .step_extrapolation import Rule, missed

#: Of each step; None where it is a full one.
Schedule = tuple[Coefficients | None, ...]

# By the last two full steps: the estimate, and all full steps.
_Paths = dict[tuple[int, int], tuple[float, tuple[int, ...]]]


def schedule_of(full: tuple[int, ...], steps: int, rule: Rule) -> Schedule:
    """Coefficients of all steps where some are full.

    Args:
        full: numbers of the full steps, ascending; the first two are 0 and 1.
        steps: of the picture.
    """
    found: list[Coefficients | None] = []
    for step in range(steps):
        before = [other for other in full if other <= step]
        found.append(None if before[-1] == step else rule(step, before[-1], before[-2]))
    return tuple(found)


def full_steps(schedule: Schedule) -> tuple[int, ...]:
    """Numbers of the full steps."""
    return tuple(step for step, pair in enumerate(schedule) if pair is None)


def best_schedules(products: np.ndarray, weights: np.ndarray, rule: Rule) -> dict[int, Schedule]:
    """The choice of short steps with the least estimated error, by number of full steps.

    The estimate is the sum of what the short steps miss, weighed. It has no other terms than of a
    step and the two full ones before it, so that dynamic programming over pairs of full steps finds
    the least.

    Args:
        products: inner products of the changes of full steps, float64 [steps, steps].
        weights: of what is missed in each step, float [steps].

    Returns:
        For 2 full steps up to all but one.
    """
    steps = len(products)
    costs = _segment_costs(products, weights, rule)
    # Least cost up to the full step `last` with `earlier` before it, and the steps that make it.
    paths: _Paths = {(0, 1): (0.0, (0, 1))}
    found: dict[int, Schedule] = {}
    for count in range(FIRST_STEPS, steps):
        ends = [
            (cost + costs[earlier, last, steps], full)
            for (earlier, last), (cost, full) in paths.items()
        ]
        found[count] = schedule_of(min(ends)[1], steps, rule)
        paths = _with_one_more(paths, costs, steps)
    return found


def _with_one_more(paths: _Paths, costs: np.ndarray, steps: int) -> _Paths:
    """Paths that have one full step more."""
    longer: _Paths = {}
    for (earlier, last), (cost, full) in paths.items():
        for following in range(last + 1, steps):
            way = cost + costs[earlier, last, following], (*full, following)
            longer[last, following] = min(longer.get((last, following), way), way)
    return longer


def _segment_costs(products: np.ndarray, weights: np.ndarray, rule: Rule) -> np.ndarray:
    """Estimated error of the short steps between two full ones: float64 [steps, steps, steps + 1].

    Of the full steps ``earlier`` and ``last``, up to the one that follows, or the end.
    """
    steps = len(products)
    costs = np.zeros((steps, steps, steps + 1))
    for earlier in range(steps):
        for last in range(earlier + 1, steps):
            for step in range(last + 1, steps):
                error = missed(products, rule(step, last, earlier), (step, last, earlier))
                costs[earlier, last, step + 1] = costs[earlier, last, step] + weights[step] * error
    return costs
