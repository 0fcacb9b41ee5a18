"""Running one component of a bundle into new buffers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sd35_trt.components import BRANCH_DENOISER
from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import Bundle, Component

from .devices.device import Buffer, Device
from .resident import EngineSet

# What runs after a component, for loading it meanwhile.
_NEXT = {
    "clip_l": ("clip_g",),
    "clip_g": ("t5",),
    "t5": ("conditioner",),
    "conditioner": ("denoiser", BRANCH_DENOISER),
}


class ComponentRunner:
    """Runs components that run once a picture; the denoiser has
    :class:`~sd35_trt.runtime.denoise.DenoiseLoop`.

    Args:
        device: that the engines run on.
        engines: the bundle's.
    """

    def __init__(self, bundle: Bundle, device: Device, engines: EngineSet) -> None:
        self._bundle = bundle
        self._device = device
        self._engines = engines

    def component(self, name: str) -> Component:
        """What the manifest says of a component.

        Raises:
            BundleError: the bundle has none of this name.
        """
        component = self._bundle.manifest.component(name)
        if component is None:
            raise BundleError(f"{self._bundle.root} has no {name}", "build it again")
        return component

    def run(
        self, name: str, inputs: Mapping[str, np.ndarray | Buffer], **dims: int
    ) -> dict[str, Buffer]:
        """Run a component; the one after it begins to load meanwhile, if there is room.

        Args:
            inputs: by port, on the host or on the device, with the port's dtype.
            dims: sizes of the dynamic dimensions of its outputs.

        Returns:
            New buffers by output port. They are computed in the order of the device's queue.

        Raises:
            BundleError: the bundle has no such component, or its engine refuses its file.
            Sd35Error: the engine failed.
        """
        session = self._engines.use(name)
        device = self._device
        feed: dict[str, Buffer] = {
            key: device.upload(value) if isinstance(value, np.ndarray) else value
            for key, value in inputs.items()
        }
        ports = self.component(name).outputs
        outputs = {port.name: device.empty(port.resolve(**dims), port.dtype) for port in ports}
        for following in _NEXT.get(name, ()):
            self._engines.load_ahead(following, name)
        session.run(feed, outputs)
        return outputs

    def download(self, buffers: Mapping[str, Buffer]) -> dict[str, np.ndarray]:
        """Buffers by name on the host, when all queued work is done."""
        return {name: self._device.download(buffer) for name, buffer in buffers.items()}
