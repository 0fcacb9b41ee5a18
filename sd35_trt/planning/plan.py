"""A plan: what of a model stays in a GPU's memory, what loads or streams, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd35_trt.backends import BACKENDS
from sd35_trt.residency import LOADED, RESIDENT, STREAMED, Residency, phases_of
from sd35_trt.targets import Target, choose_builder
from sd35_trt.units import format_bytes, format_memory

if TYPE_CHECKING:
    from sd35_trt.export.sizes import Sizes

#: Bytes/s of an NVMe disk, reading large files.
DISK_BANDWIDTH = 2e9

#: Share of the bus's peak that copies from pinned memory reach.
BUS_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Plan:
    """A plan, and what it rests on.

    Attributes:
        components: sizes by component.
        residency: what stays, loads and streams.
        budget: bytes of device memory; None where there is no limit.
        least_bytes: the peak when as little as possible stays.
        second: of the second GPU, where two draw one picture; the rest is of the first.
    """

    model: str
    variant: str
    target: Target
    policy: str
    size: tuple[int, int]
    batch: int
    steps: int
    guided: bool
    components: Mapping[str, Sizes]
    residency: Residency
    budget: int | None
    least_bytes: int
    second: Plan | None = None

    @property
    def exact(self) -> bool:
        """Whether activations are what the compiler reports."""
        return all(sizes.compiled is not None for sizes in self.components.values())

    @property
    def bus_bandwidth(self) -> float | None:
        """Bytes/s at which weights come from the host; None for the CPU or a family."""
        peak = self.target.bus_bandwidth
        return None if peak is None else BUS_EFFICIENCY * peak

    @property
    def verdict(self) -> str:
        """One line: whether it fits, and how."""
        if self.budget is None:
            whole = format_bytes(self.residency.peak_bytes)
            return f"everything resident takes {whole}; at least {format_bytes(self.least_bytes)}"
        question = f"fits in {format_memory(self.budget)}"
        if not self.residency.fits:
            backend = BACKENDS[choose_builder(self.target)]
            streams = any(map(backend.can_stream, self.components))
            streaming = "" if streams else f" ({backend.name} cannot stream weights)"
            return f"{question}: no, it takes at least {format_bytes(self.least_bytes)}{streaming}"
        kinds: dict[str, list[str]] = {RESIDENT: [], LOADED: [], STREAMED: []}
        for name, placement in self.residency.placements.items():
            kinds[placement.kind].append(name)
        if len(kinds[RESIDENT]) == len(self.components):
            return f"{question}: yes, with everything resident"
        how = [f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names]
        on_request = kinds[STREAMED] and BACKENDS[choose_builder(self.target)].streams == "asked"
        advice = " (build with --weight-streaming)" if on_request else ""
        return f"{question}: yes, with {'; '.join(how)}{advice}"

    @property
    def phase_peaks(self) -> dict[str, int]:
        """Device memory of each phase of a picture at its fullest."""
        placements = self.residency.placements
        return {
            phase: max(placements[name].peak_bytes for name in names)
            for phase, names in phases_of(placements).items()
        }

    def seconds_from_disk(self, weight_bytes: int) -> float:
        """To bring weights from disk to where they are used."""
        rates = [DISK_BANDWIDTH]
        if self.bus_bandwidth is not None:
            rates.append(self.bus_bandwidth)
        return weight_bytes / min(rates)

    def seconds_from_host(self, weight_bytes: int) -> float | None:
        """To bring weights from the host's memory into the device's."""
        return None if self.bus_bandwidth is None else weight_bytes / self.bus_bandwidth
