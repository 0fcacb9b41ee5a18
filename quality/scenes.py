"""How many of mini's scenes two bundles get right, and whether the difference is more than luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from sd35_trt.mini.scenes import Example
from sd35_trt.mini.scoring import Score, score

_LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """A share of ``count`` (0 to 1) with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """Candidate minus reference, on the same captions and seeds.

    Attributes:
        difference: of the shares, −1 to 1, with its 95 % interval ``low`` to ``high`` (adjusted
            Wald; Bonett and Price, 2012).
        lost: right by the reference alone; ``gained``: by the candidate alone.
        p: exact McNemar test: how likely so uneven a split of these is by chance.
    """

    difference: float
    low: float
    high: float
    lost: int
    gained: int
    p: float


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
) -> tuple[dict[str, Any], list[tuple[bool, bool]]]:
    """Judge two sets of pictures, uint8 [n, 128, 128, 3], of the same examples.

    Returns:
        ``whole`` and, by kind of caption, ``kinds``: reference, candidate and paired difference;
        ``attributes``: shares of statements that hold. And whether each scene is right.
    """
    one, other = score(reference, examples), score(candidate, examples)
    verdicts = [(a.whole, b.whole) for a, b in zip(one.verdicts, other.verdicts, strict=True)]
    kinds = {
        tag: _row([v for v, e in zip(verdicts, examples, strict=True) if tag in e.tags])
        for tag in one.scenes
    }
    figures = {
        "whole": _row(verdicts),
        "kinds": kinds,
        "attributes": _attributes(one, other),
    }
    return figures, verdicts


def _row(verdicts: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    one, other = [a for a, _ in verdicts], [b for _, b in verdicts]
    return {
        "reference": asdict(share(sum(one), len(one))),
        "candidate": asdict(share(sum(other), len(other))),
        "paired": asdict(paired_difference(one, other)),
    }


def _attributes(one: Score, other: Score) -> dict[str, dict[str, float]]:
    rows = {"all": (one.attribute_accuracy, other.attribute_accuracy)}
    rows |= {
        name: (value, other.attributes[name][0]) for name, (value, _) in one.attributes.items()
    }
    return {name: {"reference": a, "candidate": b} for name, (a, b) in rows.items()}
