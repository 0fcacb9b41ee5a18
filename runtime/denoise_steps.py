"""One step of the denoise loop: computed directly, or the replay of a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sd35_trt.formats.bundle import RESIDUALS

from .devices.device import Buffer, Device
from .recorder import Recorder
from .short_steps import COEFFICIENTS, SCRATCH, StepEngines

# Inputs that differ from step to step and have so many values for each image.
_CONSTANTS = {
    "sigma": 1,
    "coefficients": 3,
    "next_sigma": 1,
    "skip_guidance": 1,
    COEFFICIENTS: 2,
}

_LAYER_MASK = "layer_mask"


@dataclass(frozen=True)
class RunInputs:
    """What an engine is given in every step of a run, by port.

    Attributes:
        own: of this run, such as the guidance of each image [B]. Graphs read copies of it.
        shared: what graphs may read where it is: it stays while they do.
        layer_mask: [B, layers] of the steps with a third branch, where the engine has one.
        no_residuals: what the engine is given in steps without ControlNets, where it takes some.
    """

    own: Mapping[str, Buffer]
    shared: Mapping[str, Buffer]
    layer_mask: Buffer | None = None
    no_residuals: Buffer | None = None


class StepKind(NamedTuple):
    """What a step computes.

    Attributes:
        skipping: whether it has a third branch.
        controlled: whether ControlNets made something for it.
        short: whether it computes the first blocks alone.
        slot: see :class:`sd35_trt.runtime.short_steps.PlannedStep`.
    """

    skipping: bool = False
    controlled: bool = False
    short: bool = False
    slot: int = SCRATCH


class StepInputs(NamedTuple):
    """What differs from step to step, in as few buffers as can be: each is a copy before a replay.

    Attributes:
        constants: float32, see :func:`step_constants`.
        context, modulation: of both branches, the unconditional one first where there is one.
    """

    constants: Buffer
    context: Buffer
    modulation: Buffer


class StepOutputs(NamedTuple):
    """What a step computes, float32 [B, C, h, w] each; the step after the next overwrites both."""

    latents: Buffer
    denoised: Buffer


def step_constants(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """What differs from step to step and is known before, as one array.

    Args:
        values: by port, of each step and image [S, B], or [S, B, n].

    Returns:
        float32 [S, n B]: of each port in a fixed order, one image after the other.
    """
    columns = [values[port].reshape(len(values[port]), -1) for port in _CONSTANTS if port in values]
    return np.concatenate(columns, axis=1).astype(np.float32)


class StepFeeder:
    """Names a step's inputs by port.

    Args:
        device: of the masks.
        count: images.
        run: whose inputs they are.
        constants: ports that :func:`step_constants` was given.
    """

    def __init__(
        self, device: Device, count: int, run: RunInputs, constants: Collection[str]
    ) -> None:
        self._count = count
        self._constants = [(p, n) for p, n in _CONSTANTS.items() if p in constants]
        self._guided = "guidance" in run.own
        self._device = device
        self._no_residuals = run.no_residuals
        self._residuals: Buffer | None = None
        self._masks: dict[bool, Buffer] = {}
        if run.layer_mask is not None:
            none = device.empty((0, run.layer_mask.shape[1]), np.float32)
            self._masks = {False: none, True: run.layer_mask}

    def residuals(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Where ControlNets put what they make: the same place in every step."""
        if self._residuals is None or self._residuals.shape != shape:
            self._residuals = self._device.empty(shape, dtype)
        return self._residuals

    def ports(self, inputs: StepInputs, kind: StepKind) -> dict[str, Buffer]:
        """Inputs of the engine that differ from step to step."""
        count = self._count
        ports = {"context": inputs.context[-count:], "modulation": inputs.modulation[-count:]}
        first = 0
        for port, values in self._constants:
            own = inputs.constants[first : first + values * count]
            ports[port] = own if values == 1 else own.reshape((count, values))
            first += values * count
        if self._guided:
            ports["uncond_context"] = inputs.context[:count]
            ports["uncond_modulation"] = inputs.modulation[:count]
        if self._masks:
            ports[_LAYER_MASK] = self._masks[kind.skipping]
        residuals = self._residuals if kind.controlled else self._no_residuals
        if residuals is not None:
            ports[RESIDUALS] = residuals
        return ports


class DirectSteps:
    """Steps that the engine computes from where the inputs are."""

    def __init__(
        self,
        device: Device,
        engines: StepEngines,
        latents: np.ndarray,
        run: RunInputs,
        constants: Collection[str],
    ) -> None:
        self._engines = engines
        self._changes = engines.changes(device, latents.shape)
        self._fixed = {**run.own, **run.shared}
        self._feeder = StepFeeder(device, len(latents), run, constants)
        # Two buffers of each, used in turn: what a step reads, the next one overwrites.
        self._latents = [device.upload(latents.copy()), device.empty(latents.shape, np.float32)]
        self._denoised = [device.empty(latents.shape, np.float32),
                          device.upload(np.zeros_like(latents))]  # fmt: skip

    def residuals(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """See :meth:`StepFeeder.residuals`."""
        return self._feeder.residuals(shape, dtype)

    def latents(self, index: int) -> Buffer:
        """What a step reads."""
        return self._latents[index % 2]

    def run(self, index: int, inputs: StepInputs, kind: StepKind) -> StepOutputs:
        """Queue a step; returns its buffers."""
        read, write = index % 2, 1 - index % 2
        feed = {
            **self._feeder.ports(inputs, kind),
            **self._fixed,
            "latents": self._latents[read],
            "previous_denoised": self._denoised[write],
        }
        outputs = {"next_latents": self._latents[write], "denoised": self._denoised[read]}
        self._engines.run((kind.short, kind.slot), feed, outputs, self._changes)
        return StepOutputs(self._latents[write], self._denoised[read])


class RecordedSteps:
    """Steps that replay graphs, one for each turn of the two buffers and kind of step, on inputs
    that are copied to where the graphs read them.

    The first two steps of a shape run directly: engines allocate and choose kernels then.
    """

    def __init__(
        self,
        device: Device,
        engines: StepEngines,
        latents: np.ndarray,
        run: RunInputs,
        constants: Collection[str],
    ) -> None:
        self.engines = engines
        self._device = device
        self._changes = engines.changes(device, latents.shape)
        self._own = {name: device.empty(b.shape, b.dtype) for name, b in run.own.items()}
        mask = run.layer_mask
        self._layer_mask = None if mask is None else device.empty(mask.shape, mask.dtype)
        self._fixed = {**self._own, **run.shared}
        copies = replace(run, own=self._own, layer_mask=self._layer_mask)
        self._feeder = StepFeeder(device, len(latents), copies, constants)
        self._latents = [device.empty(latents.shape, np.float32) for _ in range(2)]
        self._denoised = [device.empty(latents.shape, np.float32) for _ in range(2)]
        self._inputs: StepInputs | None = None
        self._sources: list[int] = []  # addresses of what they were copied from
        self._recorder = Recorder(device, records=True)

    def is_of(self, engines: StepEngines) -> bool:
        """Whether the graphs are of these engines; of full steps alone, they may have more."""
        mine = self.engines
        if mine.full is not engines.full:
            return False
        if engines.short is not None:
            if mine.short not in (None, engines.short):
                return False
            self.engines = engines
        return True

    def begin(self, latents: np.ndarray, run: RunInputs) -> None:
        """Take a new batch of the same shape."""
        if run.own.keys() != self._own.keys():
            raise ValueError("runs of a loop have the same inputs")
        device = self._device
        self._sources.clear()
        device.copy(device.upload(latents), self._latents[0])
        device.copy(device.upload(np.zeros_like(latents)), self._denoised[1])
        for name, buffer in run.own.items():
            device.copy(buffer, self._own[name])
        if run.layer_mask is not None and self._layer_mask is not None:
            device.copy(run.layer_mask, self._layer_mask)

    def residuals(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """See :meth:`StepFeeder.residuals`."""
        return self._feeder.residuals(shape, dtype)

    def latents(self, index: int) -> Buffer:
        """What a step reads."""
        return self._latents[index % 2]

    def run(self, index: int, inputs: StepInputs, kind: StepKind) -> StepOutputs:
        """Queue a step; returns its buffers."""
        own = self._place(inputs)
        turn = index % 2
        self._recorder.run((turn, kind), lambda: self._compute(turn, own, kind))
        return StepOutputs(self._latents[1 - turn], self._denoised[turn])

    def _place(self, inputs: StepInputs) -> StepInputs:
        """Copy a step's inputs to where the graphs read them, which is returned."""
        # The text may be of another length.
        if self._inputs is None or self._inputs.context.shape != inputs.context.shape:
            self._recorder.forget()
            self._inputs = StepInputs(*(self._device.empty(b.shape, b.dtype) for b in inputs))
            self._sources = []
        addresses = [self._device.pointer(buffer) for buffer in inputs]
        for k, address in enumerate(addresses):
            if not self._sources or self._sources[k] != address:  # the text's is the same
                self._device.copy(inputs[k], self._inputs[k])
        self._sources = addresses
        return self._inputs

    def _compute(self, turn: int, inputs: StepInputs, kind: StepKind) -> None:
        feed = {
            **self._feeder.ports(inputs, kind),
            **self._fixed,
            "latents": self._latents[turn],
            "previous_denoised": self._denoised[1 - turn],
        }
        outputs = {
            "next_latents": self._latents[1 - turn],
            "denoised": self._denoised[turn],
        }
        self.engines.run((kind.short, kind.slot), feed, outputs, self._changes)

    def close(self) -> None:
        """Release the graphs."""
        self._device.synchronize()
        self._recorder.forget()
