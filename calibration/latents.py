"""The band that healthy latents stay in: their mean and deviation after every step."""

from __future__ import annotations

import torch

from sd35_trt.formats.band import Extremes, LatentStatistics


class LatentBand:
    """Smallest and largest mean and standard deviation of any image, by step.

    Args:
        earlier: a band to go on from; None for none.
    """

    def __init__(self, earlier: LatentStatistics | None) -> None:
        self._sigma = list(earlier.sigma) if earlier else []
        self._mean = list(earlier.mean) if earlier else []
        self._deviation = list(earlier.deviation) if earlier else []

    def add(self, step: int, sigma: float, latents: torch.Tensor) -> None:
        """Widen the band to latents [n, C, h, w] after a step; steps come in order."""
        values = latents.detach().flatten(1).double()
        if step == len(self._sigma):
            self._sigma.append(sigma)
        _widen(self._mean, step, values.mean(1))
        _widen(self._deviation, step, values.std(1, correction=0))

    def statistics(self) -> LatentStatistics:
        """The band so far."""
        return LatentStatistics(tuple(self._sigma), tuple(self._mean), tuple(self._deviation))


def _widen(bounds: list[Extremes], step: int, values: torch.Tensor) -> None:
    """Let the bounds of a step, the next one or an earlier one, hold these values."""
    low, high = float(values.min()), float(values.max())
    if step == len(bounds):
        bounds.append((low, high))
    else:
        bounds[step] = min(bounds[step][0], low), max(bounds[step][1], high)
