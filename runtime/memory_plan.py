"""How a bundle's engines share a device's memory, by the bytes that the bundle states."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from sd35_trt.backends import BACKENDS
from sd35_trt.components import SHORT_DENOISER, control_name, runs_every_step
from sd35_trt.errors import OutOfMemory
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.residency import PHASES, STREAM_BUFFERS, Footprint, Residency, plan_residency
from sd35_trt.units import format_memory

from .sessions.session import can_stream, working_bytes
from .short_steps import SLOTS, change_bytes


class MemoryPlanner:
    """Plans for requests of a size; see :mod:`sd35_trt.residency`.

    Args:
        components: those of the bundle that a picture takes, by name.
        on_gpu: whether they run on a GPU.
        budget: bytes of device memory; None is without limit.
    """

    def __init__(
        self,
        bundle: Bundle,
        components: Mapping[str, Component],
        on_gpu: bool,
        budget: int | None,
    ) -> None:
        self._bundle = bundle
        self._components = components
        self._on_gpu = on_gpu
        self._budget = budget
        self._backend = BACKENDS[bundle.manifest.builder]

    def plan(
        self, dims: Mapping[str, int], nets: Collection[str] = (), short: bool = False
    ) -> Residency:
        """Which engines stay and which come and go; within the budget where that can be.

        Args:
            dims: sizes of dynamic dimensions of the components; those left out count as least.
            nets: ControlNets that run; what the others take is not planned.
            short: whether steps are short; else what these take is not planned.
        """
        engines, reserve = self._engines(dims, nets, short), self._reserve(dims, short)
        return plan_residency(engines, self._budget, reserve)

    def plan_within_budget(
        self, dims: Mapping[str, int], nets: Collection[str] = (), short: bool = False
    ) -> Residency:
        """As :meth:`plan`.

        Raises:
            OutOfMemory: the budget is too small; names the smallest that is enough.
        """
        plan = self.plan(dims, nets, short)
        if self._budget is not None and not plan.fits:
            engines = self._engines(dims, nets, short)
            smallest = plan_residency(engines, 0, self._reserve(dims, short)).peak_bytes
            raise OutOfMemory(
                f"{self._bundle.root} does not fit in {format_memory(self._budget)} at this size",
                f"the smallest vram_budget for it is {format_memory(_round_up(smallest))}"
                + self._streaming_advice(),
            )
        return plan

    def weight_bytes(self, component: Component) -> int:
        """Memory that a component's weights take as a whole."""
        return (self._on_gpu and component.allocated_bytes) or component.weight_bytes

    def _reserve(self, dims: Mapping[str, int], short: bool) -> int:
        """What is in memory besides engines: the backend's own, adapters, and changes."""
        changes = change_bytes(self._bundle.manifest, dims) * (SLOTS if short else 1)
        adapters = sum(
            adapter_bytes(c, dims.get("rank", 1))
            for c in self._components.values()
            if c.name != SHORT_DENOISER  # it is given the other's
        )
        return adapters + changes + (self._backend.context_bytes if self._on_gpu else 0)

    def _engines(
        self, dims: Mapping[str, int], nets: Collection[str], short: bool
    ) -> list[Footprint]:
        steps = self._bundle.manifest.defaults.steps
        # A text encoder's batch is of texts.
        texts = {**dims, "batch": dims["samples"]} if "samples" in dims else dims
        return [
            Footprint(
                name,
                name,
                self.weight_bytes(component),
                working_bytes(component, texts if name in PHASES["text"] else dims),
                steps if runs_every_step(name) else 1,
                self._stream_bytes(component),
                BACKENDS[component.engine].keeps(name),
                runs_every_step(name),
            )
            for name, component in self._components.items()
            if ((net := control_name(name)) is None or net in nets)
            and (short or name != SHORT_DENOISER)
        ]

    def _stream_bytes(self, component: Component) -> int | None:
        """The least device memory that a component's weights need; None if they cannot stream."""
        if component.largest_layer_bytes is None or not can_stream(self._bundle, component):
            return None
        return min(STREAM_BUFFERS * component.largest_layer_bytes, component.weight_bytes)

    def _streaming_advice(self) -> str:
        on_request = self._backend.streams == "asked"
        if on_request and not any(can_stream(self._bundle, c) for c in self._components.values()):
            return ", or less if it is built with: --weight-streaming"
        return ""


def adapter_bytes(component: Component, rank: int) -> int:
    """Bytes of the matrices that a component takes of adapters of together this rank, padded."""
    names = {name for group in component.adapters for name in (group.down, group.up)}
    ports = (port for port in component.inputs if port.name in names)
    return sum(math.prod(port.resolve(rank=rank)) * np.dtype(port.dtype).itemsize for port in ports)


def _round_up(count: int) -> int:
    """To what :func:`format_memory` shows in full: a tenth of a megabyte or of a gigabyte."""
    unit = 100_000_000 if count >= 1_000_000_000 else 100_000
    return -(-count // unit) * unit
