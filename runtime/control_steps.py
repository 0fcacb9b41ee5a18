"""What ControlNets make in the steps of a run, on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35_trt.components import control_conditioner, control_part
from sd35_trt.formats.bundle import RESIDUALS, Component, Manifest

from .conditioning import Conditioning, StepConditioning
from .controls import ControlUse
from .devices.device import Buffer, Device
from .resident import EngineSet
from .sessions.session import Session
from .text_features import TextFeatures


def no_residuals(manifest: Manifest, device: Device) -> Buffer | None:
    """What the denoiser takes where no net runs; None where it takes none."""
    if not manifest.controls:
        return None
    denoiser = manifest.component("denoiser")
    if denoiser is None:
        return None
    port = denoiser.input(RESIDUALS)
    return device.upload(np.zeros(port.resolve(residual_samples=1, residual_pixels=1), port.dtype))


@dataclass
class _Net:
    """A net in a run.

    Attributes:
        hint: its pictures' latents [B, C, h, w].
        scale: of each image [B].
        conditioning: of each step that it runs in.
        session: its engine, once it is open.
    """

    use: ControlUse
    hint: Buffer
    scale: Buffer
    conditioning: Iterator[StepConditioning]
    session: Session | None = None


class ControlRun:
    """The nets of a run: they add up, in the bundle's order.

    Args:
        manifest: of a bundle with ControlNets.
        uses: of the run.
        hints: of each use, the latents of its pictures.
        steps: of the run.

    Attributes:
        shape, dtype: of what they make together.
    """

    def __init__(
        self,
        device: Device,
        manifest: Manifest,
        uses: Sequence[ControlUse],
        hints: Sequence[Buffer],
        steps: int,
    ) -> None:
        self._device = device
        self._steps = steps
        self._nothing = no_residuals(manifest, device)
        self._nets = [
            _Net(use, hint, device.upload(np.array(use.scales, np.float32)), iter(()))
            for use, hint in zip(uses, hints, strict=True)
        ]
        batch, _, height, width = hints[0].shape
        self._component = _component(manifest, uses[0].name)
        port = self._component.output("next_residuals")
        samples = 2 * batch if manifest.guided else batch
        # SD3's patches are 2×2 latent pixels.
        self.shape = port.resolve(samples=samples, pixels=(height // 2) * (width // 2))
        self.dtype: np.dtype[Any] = np.dtype(port.dtype)
        self._between: list[Buffer] = []

    def condition(
        self, conditioning: Conditioning, features: Sequence[TextFeatures], sigmas: np.ndarray
    ) -> None:
        """Compute what depends on the text and the timesteps alone.

        Args:
            features: of each sample.
            sigmas: [S + 1], of each step.
        """
        loop = ("denoiser", *(control_part(net.use.name) for net in self._nets))
        for net in self._nets:
            own = [i for i in range(self._steps) if net.use.counts(i, self._steps)]
            name = control_conditioner(net.use.name)
            net.conditioning = conditioning.begin(name, features, sigmas[own], beside=loop)

    def open(self, engines: EngineSet) -> None:
        """Open the nets' engines, which stay for the run's steps."""
        for net in self._nets:
            net.session = engines.use(control_part(net.use.name))

    def counts(self, step: int) -> bool:
        """Whether a net runs in a step."""
        return any(net.use.counts(step, self._steps) for net in self._nets)

    def run(self, step: int, latents: Buffer, out: Buffer) -> None:
        """Queue what the nets of a step make of its latents.

        Args:
            out: is given it, of :attr:`shape`.
        """
        nets = [net for net in self._nets if net.use.counts(step, self._steps)]
        before = self._nothing
        for number, net in enumerate(nets):
            target = out if number == len(nets) - 1 else self._spare(number % 2)
            context, modulation = next(net.conditioning)
            feed = {
                "latents": latents,
                "hint": net.hint,
                "scale": net.scale,
                "modulation": modulation,
                RESIDUALS: before,
                **({} if context is None else {"context": context}),
            }
            net.session.run(feed, {"next_residuals": target})  # type: ignore[union-attr, arg-type]
            before = target

    def _spare(self, number: int) -> Buffer:
        while len(self._between) <= number:
            self._between.append(self._device.empty(self.shape, self.dtype))
        return self._between[number]


def _component(manifest: Manifest, name: str) -> Component:
    component = manifest.component(control_part(name))
    if component is None:
        raise ValueError(f"the bundle has no ControlNet {name}")  # its contract was checked
    return component
