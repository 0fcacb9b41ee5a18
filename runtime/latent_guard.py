"""Whether the latents of a run look like those that calibration saw."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sd35_trt.formats.band import BandExtract
from sd35_trt.formats.bundle import Bundle, Manifest

from .request import Request

# How far a healthy image may leave the band, by what mini does (benchmarks/guard_margin.py): from
# 4 steps on, at guidance 1 to 7, deviations reach 1.70 times the band's, and means lie 0.14
# deviations outside it; one or two steps reach three times the band's.
_DEVIATION_FACTOR = 2.0
_MEAN_MARGIN = 0.25
_FEWEST_STEPS = 4

# And with other guidance, or with another shift, a picture says little of the engine.
_MOST_GUIDANCE = 7.0
_SHIFTS = (1.0, 6.0)


@dataclass(frozen=True)
class Anomaly:
    """One image's first deviation.

    Attributes:
        image: its place in the request.
        step: index of the step after which it showed.
        sigma: noise level there.
        seed: the image's.
        prompt: the first 12 hex digits of the prompt's SHA-256.
        what: ``not finite``, or the figure and what was expected.
        finite: False where a value is NaN or infinite.
    """

    image: int
    step: int
    sigma: float
    seed: int
    prompt: str
    what: str
    finite: bool

    def __str__(self) -> str:
        return (
            f"anomaly at step {self.step + 1} (sigma {self.sigma:.3f}), seed {self.seed}, "
            f"prompt {self.prompt}: {self.what}"
        )


@dataclass(frozen=True)
class Band:
    """Mean and deviation that latents had in calibration, by noise level.

    Attributes:
        sigma: float64 [n], ascending.
        mean, deviation: float64 [n, 2], the smallest and the largest of any image.
    """

    sigma: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, bundle: Bundle) -> Band | None:
        """That of the calibration in a bundle; None where it holds none.

        Raises:
            BundleError: the calibration in it has another form.
        """
        latents = BandExtract.of(bundle).latents
        if latents is None:
            return None
        sigma = np.array(latents.sigma, np.float64)
        order = np.argsort(sigma)
        mean, deviation = (
            np.array(bounds, np.float64).reshape(len(sigma), 2)[order]
            for bounds in (latents.mean, latents.deviation)
        )
        return cls(sigma[order], mean, deviation)

    def at(self, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of mean and of deviation that a healthy image has at a noise level."""

        def between(bounds: np.ndarray) -> np.ndarray:
            return np.array([np.interp(sigma, self.sigma, side) for side in bounds.T])

        deviation = between(self.deviation)
        mean = between(self.mean) + _MEAN_MARGIN * deviation[1] * np.array([-1, 1])
        return mean, deviation * np.array([1 / _DEVIATION_FACTOR, _DEVIATION_FACTOR])


def is_usual(manifest: Manifest, request: Request, image: int) -> bool:
    """Whether guidance and shift of an image are such as the guard's margins were measured for, or
    the bundle's own: whether an anomaly is the engine's rather than the request's."""
    own = float(manifest.scheduler.shift)
    low, high = min(own, _SHIFTS[0]), max(own, _SHIFTS[1])
    guidance = max(float(manifest.defaults.guidance), _MOST_GUIDANCE)
    return low <= request.shift <= high and request.guidance[image] <= guidance


@functools.lru_cache(maxsize=4)
def _ones(count: int) -> np.ndarray:
    """Kept: to make them takes longer than what they are for."""
    return np.ones(count, np.float32)


def _products(rows: np.ndarray, others: Iterable[np.ndarray]) -> np.ndarray:
    """Scalar product of each two rows, float64 [B] of float32 sums.

    By BLAS: NumPy's own ways to a mean and a deviation take several times as long, in every step.
    """
    pairs = zip(rows, others, strict=True)
    return np.array([np.dot(row, other) for row, other in pairs], np.float64)


class Guard:
    """Looks at the latents after every step and finds each image's first anomaly.

    Statistics are compared where there is a band and the run is like calibration's: from noise, in
    4 steps or more, and as :func:`is_usual` says. Values that are not finite are found in every
    run.

    Args:
        band: of the bundle that draws.
        manifest: the bundle's.
        request: what is drawn.

    Attributes:
        anomalies: by place of the image in the request.
    """

    def __init__(self, band: Band | None, manifest: Manifest, request: Request) -> None:
        self._usual = [is_usual(manifest, request, i) for i in range(len(request.seeds))]
        alike = request.from_noise and request.steps >= _FEWEST_STEPS
        comparable = alike and any(self._usual)
        self._band = band if comparable else None
        self._request = request
        self.anomalies: dict[int, Anomaly] = {}

    def look(self, step: int, sigma: float, latents: np.ndarray) -> None:
        """Check one step.

        Args:
            step: its index.
            sigma: noise level after it.
            latents: float32 [B, C, h, w] after it.
        """
        values = latents.reshape(len(latents), -1)
        with np.errstate(all="ignore"):  # values that are not finite, or whose squares are not
            squares = _products(values, values)
        for i in np.flatnonzero(~np.isfinite(squares)).tolist():
            # Worse than a statistic, which may have been noted in an earlier step.
            settled = i in self.anomalies and not self.anomalies[i].finite
            if not settled and not np.isfinite(values[i]).all():
                self._note(i, step, sigma, "latents are not finite", False)
        if self._band is None:
            return
        mean_band, deviation_band = self._band.at(sigma)
        count = values.shape[1]
        with np.errstate(all="ignore"):
            mean = _products(values, [_ones(count)] * len(values))
            mean /= count
            deviation = np.sqrt(np.maximum(squares / count - mean * mean, 0))
        figures: dict[str, tuple[np.ndarray, Any]] = {
            "mean": (mean, mean_band),
            "deviation": (deviation, deviation_band),
        }
        for name, (value, (low, high)) in figures.items():
            for i in np.flatnonzero(~((value >= low) & (value <= high))).tolist():
                if self._usual[i] and i not in self.anomalies:
                    what = f"{name} of the latents {value[i]:.3g}, expected {low:.3g} to {high:.3g}"
                    self._note(i, step, sigma, what, True)

    def within(self, part: slice) -> list[Anomaly]:
        """The anomalies of some of the images, counted from the first of these."""
        return [
            replace(anomaly, image=image - part.start)
            for image, anomaly in sorted(self.anomalies.items())
            if part.start <= image < part.stop
        ]

    def _note(self, image: int, step: int, sigma: float, what: str, finite: bool) -> None:
        prompt = hashlib.sha256(self._request.prompts[image].clip_l.encode()).hexdigest()[:12]
        seed = self._request.seeds[image]
        self.anomalies[image] = Anomaly(image, step, sigma, seed, prompt, what, finite)
