"""The band that healthy latents stay in: their mean and deviation after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class LatentBand:
    """Smallest and largest mean and standard deviation of any image, by step.

    Args:
        earlier: ``data`` of a band to go on from; empty for none.

    Attributes:
        data: JSON-serializable: ``sigma``, the noise level after each step, and beside it ``mean``
            and ``deviation``, the smallest and the largest of each.
    """

    def __init__(self, earlier: Mapping[str, Any]) -> None:
        self.data: dict[str, list[Any]] = {
            name: list(earlier.get(name, ())) for name in ("sigma", "mean", "deviation")
        }

    def add(self, step: int, sigma: float, latents: torch.Tensor) -> None:
        """Widen the band to latents [n, C, h, w] after a step; steps come in order."""
        pixels = latents.detach().flatten(1).double()
        figures = {"mean": pixels.mean(1), "deviation": pixels.std(1, correction=0)}
        if step == len(self.data["sigma"]):
            self.data["sigma"].append(sigma)
        for name, values in figures.items():
            bounds = [float(values.min()), float(values.max())]
            if step < len(self.data[name]):
                low, high = self.data[name][step]
                bounds = [min(low, bounds[0]), max(high, bounds[1])]
                self.data[name][step] = bounds
            else:
                self.data[name].append(bounds)
