"""One step of the denoise loop: computed directly, or the replay of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sd35_trt.formats.bundle import ADAPTER_SCALES

from .devices.device import Buffer, Device, RecordedGraph
from .sessions.session import Session


class StepInputs(NamedTuple):
    """What differs from step to step, in as few buffers as can be: each is a copy before a replay.

    Attributes:
        constants: float32 [4 B], of each image sigma, then of each image the three coefficients.
        context, modulation: of both branches, the unconditional one first where there is one.
    """

    constants: Buffer
    context: Buffer
    modulation: Buffer

    def ports(self, count: int, guidance: Buffer | None) -> dict[str, Buffer]:
        """Inputs of the engine for ``count`` images."""
        ports: dict[str, Buffer] = {
            "sigma": self.constants[:count],
            "coefficients": self.constants[count:].reshape((count, 3)),
            "context": self.context[-count:],
            "modulation": self.modulation[-count:],
        }
        if guidance is not None:
            ports["uncond_context"] = self.context[:count]
            ports["uncond_modulation"] = self.modulation[:count]
            ports["guidance"] = guidance
        return ports


class StepOutputs(NamedTuple):
    """What a step computes, float32 [B, C, h, w] each; the step after the next overwrites both."""

    latents: Buffer
    denoised: Buffer


class DirectSteps:
    """Steps that the engine computes from where the inputs are."""

    def __init__(
        self,
        device: Device,
        session: Session,
        latents: np.ndarray,
        guidance: Buffer | None,
        adapters: Mapping[str, Buffer],
    ) -> None:
        self._session = session
        self._adapters = adapters
        self._guidance = guidance
        # Two buffers of each, used in turn: what a step reads, the next one overwrites.
        self._latents = [device.upload(latents.copy()), device.empty(latents.shape, np.float32)]
        self._denoised = [device.empty(latents.shape, np.float32),
                          device.upload(np.zeros_like(latents))]  # fmt: skip

    def run(self, index: int, inputs: StepInputs) -> StepOutputs:
        """Queue a step; returns its buffers."""
        read, write = index % 2, 1 - index % 2
        feed = {
            **inputs.ports(self._latents[read].shape[0], self._guidance),
            **self._adapters,
            "latents": self._latents[read],
            "previous_denoised": self._denoised[write],
        }
        outputs = {"next_latents": self._latents[write], "denoised": self._denoised[read]}
        self._session.run(feed, outputs)
        return StepOutputs(self._latents[write], self._denoised[read])


class RecordedSteps:
    """Steps that replay graphs, one for each turn of the two buffers, on inputs that are copied to
    where the graphs read them.

    The first two steps of a shape run directly: engines allocate and choose kernels then.
    """

    def __init__(
        self,
        device: Device,
        session: Session,
        latents: np.ndarray,
        guidance: Buffer | None,
        adapters: Mapping[str, Buffer],
    ) -> None:
        self.session = session
        # The matrices where they are, which stay while a graph reads them; the scales are copied.
        self._adapters = dict(adapters)
        if (scales := adapters.get(ADAPTER_SCALES)) is not None:
            self._adapters[ADAPTER_SCALES] = device.empty(scales.shape, scales.dtype)
        self._device = device
        self._latents = [device.empty(latents.shape, np.float32) for _ in range(2)]
        self._denoised = [device.empty(latents.shape, np.float32) for _ in range(2)]
        self._guidance = None if guidance is None else device.empty(guidance.shape, guidance.dtype)
        self._inputs: StepInputs | None = None
        self._sources: list[int] = []  # addresses of what they were copied from
        self._graphs: list[RecordedGraph | None] = [None, None]
        self._ran = [False, False]
        self._scratch_version = device.scratch_version

    def begin(
        self, latents: np.ndarray, guidance: Buffer | None, adapters: Mapping[str, Buffer]
    ) -> None:
        """Take a new batch of the same shape."""
        if (guidance is None) != (self._guidance is None):
            raise ValueError("a loop has guidance in every batch, or in none")
        device = self._device
        self._sources.clear()
        device.copy(device.upload(latents), self._latents[0])
        device.copy(device.upload(np.zeros_like(latents)), self._denoised[1])
        if guidance is not None and self._guidance is not None:
            device.copy(guidance, self._guidance)
        if (scales := adapters.get(ADAPTER_SCALES)) is not None:
            device.copy(scales, self._adapters[ADAPTER_SCALES])

    def run(self, index: int, inputs: StepInputs) -> StepOutputs:
        """Queue a step; returns its buffers."""
        own = self._place(inputs)
        turn = index % 2
        if self._device.scratch_version != self._scratch_version:
            self._forget()
        graph = self._graphs[turn]
        if graph is None and self._ran[turn]:
            graph = self._graphs[turn] = self._device.capture(lambda: self._compute(turn, own))
        if graph is None:
            self._compute(turn, own)
            self._ran[turn] = True
        else:
            graph.replay()
        return StepOutputs(self._latents[1 - turn], self._denoised[turn])

    def _place(self, inputs: StepInputs) -> StepInputs:
        """Copy a step's inputs to where the graphs read them, which is returned."""
        # The text may be of another length.
        if self._inputs is None or self._inputs.context.shape != inputs.context.shape:
            self._forget()
            self._inputs = StepInputs(*(self._device.empty(b.shape, b.dtype) for b in inputs))
            self._sources = []
        addresses = [self._device.pointer(buffer) for buffer in inputs]
        for k, address in enumerate(addresses):
            if not self._sources or self._sources[k] != address:  # the text's is the same
                self._device.copy(inputs[k], self._inputs[k])
        self._sources = addresses
        return self._inputs

    def _compute(self, turn: int, inputs: StepInputs) -> None:
        feed = {
            **inputs.ports(self._latents[turn].shape[0], self._guidance),
            **self._adapters,
            "latents": self._latents[turn],
            "previous_denoised": self._denoised[1 - turn],
        }
        outputs = {
            "next_latents": self._latents[1 - turn],
            "denoised": self._denoised[turn],
        }
        self.session.run(feed, outputs)

    def _forget(self) -> None:
        for graph in self._graphs:
            if graph is not None:
                graph.close()
        self._graphs = [None, None]
        self._ran = [False, False]
        self._scratch_version = self._device.scratch_version

    def close(self) -> None:
        """Release the graphs."""
        self._device.synchronize()
        self._forget()
