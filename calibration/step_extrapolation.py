"""How well the changes of two full steps stand for that of another.

A short step takes for the change of the blocks that it leaves out ``last · c₀ + earlier · c₁``.
What it misses, and the coefficients that miss least, follow from the inner products of the changes
of full steps, so that no change need be kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sd35_trt.formats.step_cache import Coefficients

# Of what changes are large: of two that are nearly equal, least squares asks for coefficients of
# both signs without end.
_RIDGE = 1e-6

#: Coefficients of a step, of the last full one before it, and of that before: ``(step, last,
#: earlier)``.
Rule = Callable[[int, int, int], Coefficients]


def held(step: int, last: int, earlier: int) -> Coefficients:
    """The last change, as it was."""
    return 1.0, 0.0


def line_over(positions: np.ndarray) -> Rule:
    """The straight line through two changes.

    Args:
        positions: of the steps, float [steps]: their numbers, or sigmas.
    """

    def rule(step: int, last: int, earlier: int) -> Coefficients:
        ahead = positions[step] - positions[last]
        ratio = float(ahead / (positions[last] - positions[earlier]))
        return 1 + ratio, -ratio

    return rule


def least_squares(products: np.ndarray) -> Rule:
    """The coefficients that miss least.

    Args:
        products: inner products of the steps' changes, summed over pictures: float64
            [steps, steps].
    """

    def rule(step: int, last: int, earlier: int) -> Coefficients:
        both = [last, earlier]
        matrix = products[np.ix_(both, both)]
        matrix = matrix + _RIDGE * np.trace(matrix) * np.eye(2)
        first, second = np.linalg.solve(matrix, products[both, step])
        return float(first), float(second)

    return rule


def missed(products: np.ndarray, coefficients: Coefficients, steps: tuple[int, int, int]) -> float:
    """Norm of what is missed of a change, over all pictures.

    Args:
        products: as :func:`least_squares` takes them.
        steps: the step, the last full one before it, and that before.
    """
    part = products[np.ix_(steps, steps)]
    error = np.array([1.0, -coefficients[0], -coefficients[1]])
    return float(np.sqrt(max(error @ part @ error, 0.0)))
