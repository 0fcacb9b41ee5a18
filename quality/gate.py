"""Thresholds that make a report a gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sd35_trt.errors import UsageError


@dataclass(frozen=True)
class Thresholds:
    """Bounds on a report's figures; None is no bound.

    Attributes:
        min_psnr: dB, of the mean squared error of all pictures.
        min_ssim: mean over the pictures.
        max_latent_error: ‖z' − z‖ / ‖z‖ after the last step, mean over the pictures.
        max_accuracy_drop: percentage points of whole-scene accuracy below the reference's (mini).
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    max_latent_error: float | None = None
    max_accuracy_drop: float | None = None

    def check(self, scenes: bool) -> None:
        """Refuse a bound on a figure that the comparison will not have.

        Raises:
            UsageError: names the option.
        """
        if self.max_accuracy_drop is not None and not scenes:
            raise UsageError(
                "--max-accuracy-drop counts scenes, which only mini's own captions describe",
                "leave it out, or compare bundles of mini without --prompts",
            )


@dataclass(frozen=True)
class Check:
    """One figure and its bound; ``value`` None is that of equal pictures, an infinite PSNR."""

    figure: str
    unit: str
    option: str
    value: float | None
    threshold: float
    passed: bool


def checks(report: Mapping[str, Any], thresholds: Thresholds) -> list[Check]:
    """Every bound that was set, against a report's figures."""
    return list(_checks(report, thresholds))


def _checks(report: Mapping[str, Any], t: Thresholds) -> Iterator[Check]:
    images = report["images"]
    if t.min_psnr is not None:
        value = images["psnr"]["all"]
        passed = value is None or value >= t.min_psnr
        yield Check("PSNR", " dB", "--min-psnr", value, t.min_psnr, passed)
    if t.min_ssim is not None:
        value = images["ssim"]["mean"]
        yield Check("SSIM", "", "--min-ssim", value, t.min_ssim, value >= t.min_ssim)
    if t.max_latent_error is not None:
        value = report["latents"]["final"]["mean"]
        passed = value <= t.max_latent_error
        yield Check("latent error", "", "--max-latent-error", value, t.max_latent_error, passed)
    if t.max_accuracy_drop is not None:
        value = -100 * report["scenes"]["whole"]["paired"]["difference"]
        # A share of n captions is not exact in binary.
        passed = value <= t.max_accuracy_drop + 1e-9
        yield Check(
            "accuracy drop", " points", "--max-accuracy-drop", value, t.max_accuracy_drop, passed
        )


def failures(report: Mapping[str, Any]) -> list[str]:
    """What a report missed, each with the figure and its bound."""
    return [
        f"{check['figure']} {check['value']:.4g}{check['unit']} misses "
        f"{check['option']} {check['threshold']:g}"
        for check in report["gate"]
        if not check["passed"]
    ]
