"""Engines that compute next to nothing and wait where a test wants them to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.sessions.session import SessionOptions

#: Nothing that a test waits for takes longer, unless it never comes.
PATIENCE = 300.0

Arrays = Mapping[str, np.ndarray]


class FakeEngines:
    """Engines of a bundle, for the test to watch and to hold.

    An image is a function of its seed and guidance.

    Attributes:
        opened: names of the components that were loaded, in order.
        batches: number of images of each run that reached its first step.
        steps: how many denoising steps began.
        poison: called with the denoiser's latents and outputs after each step.
        error: raised by the denoiser when it is set.
    """

    def __init__(self, held: bool = False) -> None:
        self.opened: list[str] = []
        self.batches: list[int] = []
        self.steps = 0
        self.poison: Callable[[np.ndarray, Arrays], None] = lambda *_: None
        self.error: Exception | None = None
        self._held = held
        self._permits = threading.Semaphore(0)
        self._arrivals = threading.Semaphore(0)

    def pipeline(
        self, root: Path, fallback: Path | None = None, device: str | None = None
    ) -> Pipeline:
        other = None if fallback is None else Bundle.open(fallback)
        return Pipeline(Bundle.open(root), open_session=self.open, fallback=other, device=device)

    def open(
        self, bundle: Bundle, component: Component, device: Device, options: SessionOptions
    ) -> _Fake:
        self.opened.append(component.name)
        return _Fake(self, component.name)

    def wait_for_step(self) -> None:
        """Until the denoiser is about to compute one."""
        assert self._arrivals.acquire(timeout=PATIENCE)

    def let(self, steps: int) -> None:
        """Allow the denoiser some steps."""
        self._permits.release(steps)

    def hold(self) -> None:
        """Wait before every step from now on."""
        self._permits, self._arrivals = threading.Semaphore(0), threading.Semaphore(0)
        self._held = True

    def release(self) -> None:
        """Let it run freely from now on."""
        self._held = False
        self._permits.release(1000)

    def denoise(self, inputs: Arrays, outputs: Arrays) -> None:
        self.steps += 1
        if inputs["sigma"][0] == 1.0:
            self.batches.append(len(inputs["latents"]))
        self._arrivals.release()
        if self._held:
            assert self._permits.acquire(timeout=PATIENCE)
        if self.error is not None:
            raise self.error
        guidance = inputs["guidance"].reshape(-1, 1, 1, 1)
        outputs["next_latents"][:] = inputs["latents"] + 0.01 * guidance
        outputs["denoised"][:] = inputs["latents"]
        self.poison(inputs["latents"], outputs)


class _Fake:
    recordable = False

    def __init__(self, engines: FakeEngines, name: str) -> None:
        self._engines, self._name = engines, name

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        if self._name == "denoiser":
            self._engines.denoise(inputs, outputs)
            return
        for array in outputs.values():
            array[:] = 0
        if self._name == "vae_decoder":
            corner = np.nan_to_num(inputs["latents"][:, 0, 0, :3])
            outputs["image"][:] = (128 + 20 * corner).clip(0, 255)[:, None, None, :]

    def close(self) -> None:
        """Nothing to release."""


def overflow(what: str = "onnxruntime") -> Sd35Error:
    return Sd35Error(f"denoiser failed in {what}", "look into it")


def same(one: Any, other: Any) -> None:
    """Two results with the same images and parameters."""
    np.testing.assert_array_equal(one.images, other.images)
    assert one.parameters == other.parameters
