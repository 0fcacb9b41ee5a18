"""How many of mini's scenes two bundles get right, and whether the difference is more than luck."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from sd35_trt.formats.report import PairedDifference, Scenes, SceneShares, Share, StatementShares
from sd35_trt.mini.scenes import Example
from sd35_trt.mini.scoring import Score, score

_LEVEL = 0.95


def share(successes: int, count: int) -> Share:
    """A share with its interval."""
    low, high = stats.binomtest(successes, count).proportion_ci(_LEVEL, method="wilson")
    return Share(successes / count, float(low), float(high), count)


def paired_difference(reference: Sequence[bool], candidate: Sequence[bool]) -> PairedDifference:
    """Compare two bundles' verdicts caption by caption."""
    pairs = list(zip(reference, candidate, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    n = len(pairs)
    # One more discordant pair each way, so that none at all does not mean certainty.
    fewer, more = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    z = float(stats.norm.ppf((1 + _LEVEL) / 2))
    margin = z * ((more + fewer - (more - fewer) ** 2) / (n + 2)) ** 0.5
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    low, high = max(more - fewer - margin, -1.0), min(more - fewer + margin, 1.0)
    return PairedDifference((gained - lost) / n, low, high, lost, gained, p)


def compare_scenes(
    reference: np.ndarray, candidate: np.ndarray, examples: Sequence[Example]
) -> tuple[Scenes, list[tuple[bool, bool]]]:
    """Judge two sets of pictures, uint8 [n, 128, 128, 3], of the same examples.

    Returns:
        The figures, and of each example whether the reference's and the candidate's scene is right.
    """
    one, other = score(reference, examples), score(candidate, examples)
    verdicts = [(a.whole, b.whole) for a, b in zip(one.verdicts, other.verdicts, strict=True)]
    kinds = {
        tag: _shares([v for v, e in zip(verdicts, examples, strict=True) if tag in e.tags])
        for tag in one.scenes
    }
    return Scenes(_shares(verdicts), kinds, _attributes(one, other)), verdicts


def _shares(verdicts: Sequence[tuple[bool, bool]]) -> SceneShares:
    one, other = [a for a, _ in verdicts], [b for _, b in verdicts]
    return SceneShares(
        share(sum(one), len(one)), share(sum(other), len(other)), paired_difference(one, other)
    )


def _attributes(one: Score, other: Score) -> dict[str, StatementShares]:
    rows = {"all": StatementShares(one.attribute_accuracy, other.attribute_accuracy)}
    for name, (value, _) in one.attributes.items():
        rows[name] = StatementShares(value, other.attributes[name][0])
    return rows
