"""The runtime's steps, shown in ComfyUI: progress, previews, interrupts."""

from __future__ import annotations

import latent_preview
import torch
from comfy import model_management
from comfy.utils import ProgressBar

from sd35_trt.runtime import Step

from .arrays import FORMAT


class Watcher:
    """A callback of a run, or of several that follow each other.

    Args:
        runs: how many.
    """

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._done = 0
        self._bar = ProgressBar(runs)
        self._previewer = latent_preview.get_previewer(torch.device("cpu"), FORMAT)
        self.check()

    def check(self) -> None:
        """Raise ComfyUI's own exception where the user has interrupted."""
        model_management.throw_exception_if_processing_interrupted()

    def next_run(self) -> None:
        """The run that was watched is over."""
        self._done += 1

    def __call__(self, step: Step) -> None:
        self.check()
        preview = None
        if self._previewer is not None:
            denoised = torch.from_numpy(step.denoised)
            preview = self._previewer.decode_latent_to_preview_image("JPEG", denoised)
        steps = self._done * step.total + step.index + 1
        self._bar.update_absolute(steps, self._runs * step.total, preview)
