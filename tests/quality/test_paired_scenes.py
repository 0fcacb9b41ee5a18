"""Shares, intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from sd35_trt.mini.rendering import render
from sd35_trt.mini.scoring import heldout
from sd35_trt.quality.scenes import compare_scenes, paired_difference, share


def test_wilson_interval() -> None:
    """Against the values of Newcombe (1998), table I, and for shares of 0 and 1."""
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
        estimate = share(successes, count)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
        assert estimate.value == successes / count
        mirrored = share(count - successes, count)
        assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_paired_difference() -> None:
    # 30 right in both, 6 lost, 1 gained, 13 wrong in both.
    reference = [True] * 36 + [False] * 14
    candidate = [True] * 30 + [False] * 6 + [True] + [False] * 13
    estimate = paired_difference(reference, candidate)
    assert (estimate.lost, estimate.gained) == (6, 1)
    assert estimate.difference == pytest.approx(-0.1)
    assert estimate.p == pytest.approx(2 * (1 + 7) / 2**7)  # two-sided, by the binomial
    fewer, more = 7 / 52, 2 / 52
    margin = 1.959964 * ((fewer + more - (fewer - more) ** 2) / 52) ** 0.5
    assert estimate.low == pytest.approx(more - fewer - margin, abs=1e-6)
    assert estimate.high == pytest.approx(more - fewer + margin, abs=1e-6)
    mirrored = paired_difference(candidate, reference)
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))
    assert mirrored.p == estimate.p


def test_no_difference_is_not_certainty() -> None:
    few, many = (paired_difference([True] * n, [True] * n) for n in (10, 1000))
    assert few.difference == many.difference == 0.0
    assert few.p == many.p == 1.0
    assert few.low < -0.1 < many.low < 0 < many.high < 0.1 < few.high


def test_scenes_by_kind_of_caption() -> None:
    examples = heldout(12)
    true = np.stack([render(e.scene) for e in examples])
    drawn = true.copy()
    drawn[:5] = 250  # nothing in them
    figures, verdicts = compare_scenes(true, drawn, examples)
    assert verdicts == [(True, False)] * 5 + [(True, True)] * 7
    assert figures.whole.reference.value == 1.0
    assert figures.whole.candidate.value == pytest.approx(7 / 12)
    assert figures.whole.paired.lost == 5
    for tag, row in figures.kinds.items():
        with_tag = [i for i, e in enumerate(examples) if tag in e.tags]
        assert row.candidate.count == len(with_tag)
        assert row.paired.lost == sum(i < 5 for i in with_tag)
    assert figures.attributes["shape"].reference == 1.0
    assert figures.attributes["shape"].candidate < 1.0
