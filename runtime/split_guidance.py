"""Two devices that draw one picture: each computes a branch of guidance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35_trt.formats.bundle import Manifest

from .denoise_steps import RunInputs, StepInputs, StepKind, StepOutputs
from .devices.device import Buffer, Device
from .devices.peer_copies import Copy, exchange
from .lane import BranchEngines, Lane

# Shapes whose buffers and graphs are kept.
_SHAPES = 2


class SplitSteps:
    """Steps of two lanes, of which the first has what the others are told of.

    What the branches denoised is exchanged between graphs, not in one: a step is a graph of each
    device, the exchange, and another graph of each.
    """

    def __init__(self, lanes: tuple[Lane, Lane]) -> None:
        self.lanes = lanes
        self._made: Buffer | None = None
        self._text: int | None = None  # address of what was handed over

    def is_of(self, engines: tuple[BranchEngines, BranchEngines]) -> bool:
        """Whether the graphs are of these engines."""
        return all(
            lane.engines.branch is own.branch and lane.engines.combine is own.combine
            for lane, own in zip(self.lanes, engines, strict=True)
        )

    def begin(
        self,
        latents: np.ndarray,
        runs: tuple[RunInputs, RunInputs],
        constants: Mapping[str, np.ndarray],
    ) -> None:
        """Take a new batch of the same shape.

        Args:
            runs: inputs of each lane.
            constants: what differs from step to step, by port.
        """
        self._text = None
        for lane, run in zip(self.lanes, runs, strict=True):
            lane.device.activate()
            lane.begin(latents, run, constants)
        self.lanes[0].device.activate()

    def residuals(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Where ControlNets put what they make for both branches, on the first device."""
        if self._made is None or self._made.shape != shape:
            self._made = self.lanes[0].device.empty(shape, dtype)
        return self._made

    def latents(self, index: int) -> Buffer:
        """What a step reads."""
        return self.lanes[0].latents(index % 2)

    def run(self, index: int, inputs: StepInputs, kind: StepKind) -> StepOutputs:
        """Queue a step; returns its buffers, of the first device.

        Args:
            inputs: on the first device, of both branches; each lane has the constants itself.
        """
        first, second = self.lanes
        self._hand_over(inputs, kind)
        for lane in (second, first):
            lane.device.activate()
            lane.denoise(index, kind)
        exchange(
            first.device, second.device,
            [Copy(first.other_branch, second.own_branch)],
            [Copy(second.other_branch, first.own_branch)],
        )  # fmt: skip
        for lane in (second, first):
            lane.device.activate()
            lane.combine(index, kind)
        turn = index % 2
        return StepOutputs(first.latents(1 - turn), first.denoised(turn))

    def _hand_over(self, inputs: StepInputs, kind: StepKind) -> None:
        """Give each lane its branch's text and time, and what ControlNets made."""
        first, second = self.lanes
        address = first.device.pointer(inputs.context)
        text, self._text = address != self._text, address
        mine, its = list(first.place(inputs, text)), list(second.place(inputs, text))
        if kind.controlled and self._made is not None:
            mine += first.place_residuals(self._made)
            its += second.place_residuals(self._made)
        for copy in mine:
            first.device.copy(copy.source, copy.target)
        exchange(first.device, second.device, to_other=its)

    def close(self) -> None:
        """Release the graphs."""
        with ExitStack() as closing:
            for lane in self.lanes:
                closing.callback(lane.close)
                closing.callback(lane.device.activate)


@dataclass(frozen=True)
class SplitRun:
    """A run on two devices.

    Attributes:
        guidance: whose steps they are.
        engines: of each device.
        second: inputs of the run on the second device.
    """

    guidance: SplitGuidance
    engines: tuple[BranchEngines, BranchEngines]
    second: RunInputs

    def steps(
        self, latents: np.ndarray, first: RunInputs, constants: Mapping[str, np.ndarray]
    ) -> SplitSteps:
        """See :meth:`SplitGuidance.steps`.

        Args:
            first: inputs of the run on the first device.
        """
        return self.guidance.steps(self.engines, latents, (first, self.second), constants)


class SplitGuidance:
    """Steps on two devices, by shape; those of the latest are kept.

    Args:
        devices: whose copies go directly.
        manifest: of the bundle.
    """

    def __init__(self, devices: tuple[Device, Device], manifest: Manifest) -> None:
        self._devices = devices
        self._manifest = manifest
        self._kept: OrderedDict[tuple[int, ...], SplitSteps] = OrderedDict()

    def steps(
        self,
        engines: tuple[BranchEngines, BranchEngines],
        latents: np.ndarray,
        runs: tuple[RunInputs, RunInputs],
        constants: Mapping[str, np.ndarray],
    ) -> SplitSteps:
        """Steps of a batch, which have taken it.

        Args:
            engines, runs: of each device.
            latents: float32 [B, C, h, w].
            constants: what differs from step to step, by port.
        """
        # Graphs read what is shared where it is.
        shared = (
            device.pointer(buffer)
            for device, run in zip(self._devices, runs, strict=True)
            for buffer in run.shared.values()
        )
        key = (*latents.shape, *shared)
        steps = self._kept.pop(key, None)
        if steps is not None and not steps.is_of(engines):
            steps.close()
            steps = None
        if steps is None:
            steps = self._new(engines, latents.shape, runs, constants)
        self._kept[key] = steps
        while len(self._kept) > _SHAPES:
            self._kept.popitem(last=False)[1].close()
        steps.begin(latents, runs, constants)
        return steps

    def _new(
        self,
        engines: tuple[BranchEngines, BranchEngines],
        shape: tuple[int, ...],
        runs: tuple[RunInputs, RunInputs],
        constants: Mapping[str, np.ndarray],
    ) -> SplitSteps:
        lanes = []
        for branch in range(2):
            device = self._devices[branch]
            device.activate()
            lanes.append(
                Lane(
                    device, engines[branch], branch, self._manifest, shape, runs[branch], constants
                )
            )
        self._devices[0].activate()
        return SplitSteps((lanes[0], lanes[1]))

    def forget(self) -> None:
        """Release graphs and buffers; called before an engine that was recorded closes."""
        with ExitStack() as closing:
            for steps in self._kept.values():
                closing.callback(steps.close)
            self._kept.clear()
