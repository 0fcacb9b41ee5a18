from __future__ import annotations

import pytest

from sd35_trt.errors import UsageError
from sd35_trt.formats.report import (
    FinalError,
    FreeRunning,
    LatentErrors,
    Likeness,
    PairedDifference,
    Psnr,
    Scenes,
    SceneShares,
    Share,
    Spread,
    TeacherForced,
)
from sd35_trt.quality.gate import Thresholds, checks, failures

Figures = tuple[Likeness, LatentErrors, Scenes]


def figures(psnr: float | None, ssim: float, error: float, difference: float) -> Figures:
    """Those that have bounds; the others are 0."""
    latents = LatentErrors(
        sigma=(0.0,),
        free_running=FreeRunning((0.0,), (0.0,), (0.0,), (0.0,)),
        teacher_forced=TeacherForced((0.0,), 1),
        final=FinalError(error, 0.0, 0.0),
    )
    share = Share(0.0, 0.0, 0.0, 1)
    whole = SceneShares(share, share, PairedDifference(difference, 0.0, 0.0, 0, 0, 0.0))
    images = Likeness(0, Psnr(psnr, 0.0, 0.0), Spread(ssim, 0.0, 0.0), None, "")
    return images, latents, Scenes(whole, {}, {})


BOUNDS = Thresholds(30.0, 0.9, 0.1, 1.0)


def missed(values: Figures) -> list[str]:
    gate = checks(BOUNDS, *values)
    assert len(gate) == 4
    lines = failures(gate)
    assert len(lines) == sum(not check.passed for check in gate)
    return lines


def test_every_bound_is_inclusive() -> None:
    assert missed(figures(30.0, 0.9, 0.1, -0.01)) == []
    assert missed(figures(None, 1.0, 0.0, 0.0)) == []
    assert missed(figures(50.0, 1.0, 0.0, +0.2)) == []
    # 5 of 500 is one point, although 100 * (475 - 480) / 500 in binary need not be.
    assert missed(figures(30.0, 0.9, 0.1, 0.95 - 0.96)) == []


def test_what_is_missed_is_named_with_its_bound() -> None:
    assert missed(figures(29.99, 0.899, 0.11, -0.012)) == [
        "PSNR 29.99 dB misses --min-psnr 30",
        "SSIM 0.899 misses --min-ssim 0.9",
        "latent error 0.11 misses --max-latent-error 0.1",
        "accuracy drop 1.2 points misses --max-accuracy-drop 1",
    ]


def test_no_bound_no_check() -> None:
    values = figures(1.0, 0.1, 9.0, -1.0)
    assert checks(Thresholds(), *values) == ()
    (check,) = checks(Thresholds(min_psnr=0.5), *values)
    assert check.passed


def test_accuracy_needs_scenes() -> None:
    with pytest.raises(UsageError, match="--max-accuracy-drop counts scenes"):
        BOUNDS.check(scenes=False)
    BOUNDS.check(scenes=True)
    images, latents, _ = figures(50.0, 1.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="--max-accuracy-drop counts scenes"):
        checks(BOUNDS, images, latents, None)
