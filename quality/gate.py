"""Thresholds that make a report a gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sd35_trt.errors import UsageError
from sd35_trt.formats.report import Check, LatentErrors, Likeness, Scenes


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


def checks(
    thresholds: Thresholds, images: Likeness, latents: LatentErrors, scenes: Scenes | None
) -> tuple[Check, ...]:
    """Every bound that was set, against a report's figures.

    Raises:
        UsageError: see :meth:`Thresholds.check`.
    """
    thresholds.check(scenes is not None)
    return tuple(_checks(thresholds, images, latents, scenes))


def _checks(
    t: Thresholds, images: Likeness, latents: LatentErrors, scenes: Scenes | None
) -> Iterator[Check]:
    if t.min_psnr is not None:
        psnr = images.psnr.all
        passed = psnr is None or psnr >= t.min_psnr
        yield Check("PSNR", " dB", "--min-psnr", psnr, t.min_psnr, passed)
    if t.min_ssim is not None:
        ssim = images.ssim.mean
        yield Check("SSIM", "", "--min-ssim", ssim, t.min_ssim, ssim >= t.min_ssim)
    if t.max_latent_error is not None:
        error = latents.final.mean
        passed = error <= t.max_latent_error
        yield Check("latent error", "", "--max-latent-error", error, t.max_latent_error, passed)
    if t.max_accuracy_drop is not None and scenes is not None:
        drop = -100 * scenes.whole.paired.difference
        # A share of n captions is not exact in binary.
        passed = drop <= t.max_accuracy_drop + 1e-9
        yield Check(
            "accuracy drop", " points", "--max-accuracy-drop", drop, t.max_accuracy_drop, passed
        )


def failures(gate: Iterable[Check]) -> list[str]:
    """What a report missed, each with the figure and its bound."""
    return [
        f"{check.figure} {check.value:.4g}{check.unit} misses {check.option} {check.threshold:g}"
        for check in gate
        if not check.passed
    ]
