"""The figures of a comparison: latents, pictures, scenes and single linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from sd35_trt.backends import BACKENDS
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.report import (
    FinalError,
    FreeRunning,
    LatentErrors,
    Likeness,
    LinearError,
    PicturePair,
    Psnr,
    Scenes,
    Spread,
    TeacherForced,
)
from sd35_trt.mini.scenes import Example
from sd35_trt.progress import Progress

from .draw import CandidateDrawing, PictureSet, ReferenceDrawing, draw_candidate, draw_reference
from .metrics import load_lpips, psnr, squared_error, ssim
from .page import Pictures


@dataclass(frozen=True)
class Figures:
    """What was measured; see :class:`sd35_trt.formats.report.Report`."""

    linears: tuple[LinearError, ...]
    linears_note: str
    latents: LatentErrors
    images: Likeness
    scenes: Scenes | None
    each: tuple[PicturePair, ...]


def measure(
    reference: Bundle,
    candidate: Bundle,
    pictures: PictureSet,
    examples: Sequence[Example] | None,
    spool: Path,
    progress: Progress,
) -> tuple[Figures, Pictures]:
    """Draw with both bundles and compare.

    Args:
        examples: the scenes that the prompts describe, where they are mini's.
        spool: an empty folder for latents.

    Returns:
        The figures, and the pictures.
    """
    count = len(pictures.prompts)
    again = len(set(next(pictures.batches())))  # the first batch, which is drawn twice
    one = draw_reference(
        reference, pictures, spool, lambda done: progress("reference", int(done), count)
    )
    other = draw_candidate(
        candidate,
        pictures,
        one,
        spool,
        lambda done: progress("candidate", int(done), count + again),
    )
    linears, note = _linears(reference, candidate, one, progress)
    images = Pictures(one.images, other.images)
    each, over_all = _compare_images(images, pictures, other, progress)
    scenes: Scenes | None = None
    if examples is not None:
        from .scenes import compare_scenes

        scenes, verdicts = compare_scenes(one.images, other.images, examples)
        each = [
            replace(pair, reference_right=right, candidate_right=still)
            for pair, (right, still) in zip(each, verdicts, strict=True)
        ]
    figures = Figures(tuple(linears), note, _latents(one, other), over_all, scenes, tuple(each))
    return figures, images


def _linears(
    reference: Bundle, candidate: Bundle, drawing: ReferenceDrawing, progress: Progress
) -> tuple[list[LinearError], str]:
    """Errors of every linear; or none, and why."""
    errors: list[LinearError] = []
    total = 100 * len(drawing.feeds)
    for done, (name, feeds) in enumerate(drawing.feeds.items()):
        one, other = (bundle.manifest.component(name) for bundle in (reference, candidate))
        if (
            one is None
            or other is None
            or any(BACKENDS[c.engine].needs_library for c in (one, other))
        ):
            return [], "single layers are compared in ONNX Runtime bundles only"
        # Where the bundles are others', ONNX Runtime need not be installed.
        from .linears import equal_linears, linear_errors

        path = reference.path(one.files[0].path)
        if [file.sha256 for file in one.files] == [file.sha256 for file in other.files]:
            errors += equal_linears(name, path)
            progress("layers", 100 * (done + 1), total)
            continue

        def report(fraction: float, done: int = done) -> None:
            progress("layers", int(100 * (done + fraction)), total)

        errors += linear_errors(
            name,
            path,
            candidate.path(other.files[0].path),
            feeds,
            report,
        )
    return errors, ""


def _latents(one: ReferenceDrawing, other: CandidateDrawing) -> LatentErrors:
    free, final = other.free, other.free[-1]
    return LatentErrors(
        sigma=tuple(one.sigmas.tolist()),
        free_running=FreeRunning(
            mean=tuple(free.mean(axis=1).tolist()),
            p10=tuple(np.percentile(free, 10, axis=1).tolist()),
            median=tuple(np.median(free, axis=1).tolist()),
            p90=tuple(np.percentile(free, 90, axis=1).tolist()),
        ),
        teacher_forced=TeacherForced(
            mean=tuple(other.forced.mean(axis=1).tolist()), images=other.forced.shape[1]
        ),
        final=FinalError(
            mean=float(final.mean()), median=float(np.median(final)), max=float(final.max())
        ),
    )


def _compare_images(
    images: Pictures, pictures: PictureSet, other: CandidateDrawing, progress: Progress
) -> tuple[list[PicturePair], Likeness]:
    """Per picture and over all."""
    distance, note = load_lpips()
    each: list[PicturePair] = []
    pairs = zip(images.candidate, images.reference, strict=True)
    for i, (image, expected) in enumerate(pairs):
        error = squared_error(image, expected)
        each.append(
            PicturePair(
                prompt=pictures.prompts[i],
                seed=pictures.seed + i,
                squared_error=error,
                psnr=psnr(error),
                ssim=ssim(image, expected),
                lpips=distance(image, expected) if distance else None,
                latent_error=float(other.free[-1, i]),
            )
        )
        progress("pictures", i + 1, len(pictures.prompts))
    errors = [pair.squared_error for pair in each]
    similarities = [pair.ssim for pair in each]
    distances = [pair.lpips for pair in each if pair.lpips is not None]
    over_all = Likeness(
        identical=errors.count(0.0),
        psnr=Psnr(
            all=psnr(float(np.mean(errors))),
            median=psnr(float(np.median(errors))),
            worst=psnr(max(errors)),
        ),
        ssim=_spread(similarities, min(similarities)),
        lpips=_spread(distances, max(distances)) if distances else None,
        lpips_note=note,
    )
    return each, over_all


def _spread(values: Sequence[float], worst: float) -> Spread:
    return Spread(float(np.mean(values)), float(np.median(values)), worst)
