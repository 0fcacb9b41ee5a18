"""How far two bundles' pictures are apart."""

from __future__ import annotations

import math

from sd35_trt.formats.report import LinearError, Report

from .console import fact_table, open_console


def print_quality(report: Report, page: str) -> None:
    """Print the main figures of a comparison.

    Args:
        page: where the whole report is.
    """
    images, final, run = report.images, report.latents.final, report.run
    psnr, ssim, lpips = images.psnr, images.ssim, images.lpips

    def decibels(value: float | None) -> str:
        return "∞" if value is None else f"{value:.1f}"

    facts = {
        "pictures": f"{run.images} pairs, {run.steps} steps, {run.prompts}",
        "latent error": f"{final.mean:.3g} mean, {final.median:.3g} median, "
        f"{final.max:.3g} largest",
        "PSNR": f"{decibels(psnr.all)} dB, {decibels(psnr.median)} median, "
        f"{decibels(psnr.worst)} worst",
        "SSIM": f"{ssim.mean:.3f} mean, {ssim.median:.3f} median, {ssim.worst:.3f} worst",
        "LPIPS": f"{lpips.mean:.3g} mean, {lpips.worst:.3g} worst"
        if lpips
        else f"not available: {images.lpips_note}",
    }
    quantized = [row for row in report.linears if row.precision not in ("half", "fp32")]
    if quantized:
        worst = max(quantized, key=_severity)
        error = "not finite" if worst.own_error is None else f"{worst.own_error:.3g}"
        facts["layers"] = (
            f"{len(quantized)} quantized linears, the worst {error}: "
            f"{worst.component}/{worst.layer}"
        )
    if report.scenes:
        whole = report.scenes.whole
        paired = whole.paired
        facts["scenes right"] = (
            f"{100 * whole.candidate.value:.1f} %, reference "
            f"{100 * whole.reference.value:.1f} %, difference "
            f"{100 * paired.difference:+.1f} points "
            f"({100 * paired.low:+.1f} to {100 * paired.high:+.1f})"
        )
    facts["report"] = f"{page}, in {report.seconds:.0f} s"
    open_console().print(fact_table(facts))


def _severity(linear: LinearError) -> float:
    return math.inf if linear.own_error is None else linear.own_error
