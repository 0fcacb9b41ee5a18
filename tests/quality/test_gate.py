from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from sd35_trt.errors import UsageError
from sd35_trt.quality.gate import Thresholds, checks, failures


def report(psnr: float | None, ssim: float, error: float, difference: float) -> dict[str, Any]:
    return {
        "images": {"psnr": {"all": psnr}, "ssim": {"mean": ssim}},
        "latents": {"final": {"mean": error}},
        "scenes": {"whole": {"paired": {"difference": difference}}},
    }


BOUNDS = Thresholds(30.0, 0.9, 0.1, 1.0)


def missed(figures: dict[str, Any], bounds: Thresholds = BOUNDS) -> list[str]:
    found = checks(figures, bounds)
    lines = failures({"gate": [asdict(check) for check in found]})
    assert len(lines) == sum(not check.passed for check in found)
    return lines


def test_every_bound_is_inclusive() -> None:
    assert missed(report(30.0, 0.9, 0.1, -0.01)) == []
    assert missed(report(None, 1.0, 0.0, 0.0)) == []
    assert missed(report(50.0, 1.0, 0.0, +0.2)) == []
    # 5 of 500 is one point, although 100 * (475 - 480) / 500 in binary need not be.
    assert missed(report(30.0, 0.9, 0.1, 0.95 - 0.96)) == []


def test_what_is_missed_is_named_with_its_bound() -> None:
    assert missed(report(29.99, 0.899, 0.11, -0.012)) == [
        "PSNR 29.99 dB misses --min-psnr 30",
        "SSIM 0.899 misses --min-ssim 0.9",
        "latent error 0.11 misses --max-latent-error 0.1",
        "accuracy drop 1.2 points misses --max-accuracy-drop 1",
    ]


def test_no_bound_no_check() -> None:
    assert checks(report(1.0, 0.1, 9.0, -1.0), Thresholds()) == []
    assert checks({"images": {"psnr": {"all": 1.0}}}, Thresholds(min_psnr=0.5))[0].passed


def test_accuracy_needs_scenes() -> None:
    with pytest.raises(UsageError, match="--max-accuracy-drop counts scenes"):
        BOUNDS.check(scenes=False)
    BOUNDS.check(scenes=True)
