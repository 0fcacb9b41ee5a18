"""The denoise loop: latents stay on the device, the host looks at copies behind it."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .conditioning import StepConditioning
from .control_steps import ControlRun
from .denoise_steps import (
    DirectSteps,
    RecordedSteps,
    RunInputs,
    StepInputs,
    StepKind,
    step_constants,
)
from .devices.device import Buffer, Device, Fetch
from .host_slots import SLOT_BYTES, HostSlots
from .job import Step
from .short_steps import COEFFICIENTS, PlannedStep, StepEngines, step_coefficients
from .split_guidance import SplitRun, SplitSteps
from .timing import Clock

# Shapes whose buffers and graphs are kept.
_SHAPES = 2


@dataclass(frozen=True)
class Schedule:
    """What changes from step to step, known before the loop.

    Attributes:
        sigmas: float32 [S + 1], of a step and, last, after it.
        coefficients: float32 [S, 3], see :mod:`sd35_trt.runtime.schedule`.
        skip_guidance: float32 [S, B], how much of the third branch each image has; None where the
            engine has none.
        next_sigmas: whether the engine is told the noise after each step, too.
        planned: which steps are short; empty where none is. None where the bundle has no such.
    """

    sigmas: np.ndarray
    coefficients: np.ndarray
    skip_guidance: np.ndarray | None = None
    next_sigmas: bool = False
    planned: Sequence[PlannedStep] | None = None

    def constants(self, count: int) -> dict[str, np.ndarray]:
        """Of each step and of ``count`` images, by the engine's port: [S, B], or [S, B, n]."""

        def of_each(values: np.ndarray) -> np.ndarray:
            return np.repeat(values[:, None], count, axis=1)

        constants = {
            "sigma": of_each(self.sigmas[:-1]),
            "coefficients": of_each(self.coefficients),
        }
        if self.next_sigmas:
            constants["next_sigma"] = of_each(self.sigmas[1:])
        if self.skip_guidance is not None:
            constants["skip_guidance"] = self.skip_guidance
        if self.planned is not None:
            steps = len(self.coefficients)
            constants[COEFFICIENTS] = step_coefficients(self.planned, steps, count)
        return constants

    def kind(self, step: int, controlled: bool) -> StepKind:
        """What a step computes.

        Args:
            controlled: whether ControlNets make something for it.
        """
        planned = self.planned[step] if self.planned else PlannedStep()
        short = planned.coefficients is not None
        return StepKind(self.skips(step), controlled, short, planned.slot)

    def skips(self, step: int) -> bool:
        """Whether a step has a third branch."""
        return self.skip_guidance is not None and bool(self.skip_guidance[step].any())


class DenoiseLoop:
    """Denoising on one engine. Where the engine's work can be recorded, a step is the replay of
    a graph.

    Steps are queued ahead of what the host has seen: by one where somebody looks at each, else by
    as many as there is memory for. The device never waits for the host.

    Args:
        device: that the engine runs on.
        limited: whether its memory is kept within a budget.
    """

    def __init__(self, device: Device, limited: bool = False) -> None:
        self._device = device
        self._limited = limited
        self._slots = HostSlots(device)
        self._recorded: OrderedDict[tuple[int, ...], RecordedSteps] = OrderedDict()

    def run(
        self,
        engines: StepEngines | SplitRun,
        latents: np.ndarray,
        schedule: Schedule,
        conditioning: Iterator[StepConditioning],
        after_step: Callable[[Step], bool],
        watched: bool,
        clock: Clock,
        run_inputs: RunInputs,
        controls: ControlRun | None = None,
    ) -> tuple[Buffer, np.ndarray]:
        """Denoise a batch.

        Args:
            engines: which are open, of one device or of two.
            latents: float32 [B, C, h, w], noise or what it was mixed with.
            conditioning: of each step context [N, T, D] and modulation [N, R, D]; with guidance
                N is 2 B, the unconditional branch first.
            after_step: called once per step, in order; False ends the loop.
            watched: whether somebody acts on what ``after_step`` sees.
            clock: its stages ``conditioning`` and ``denoise``.
            run_inputs: what the engine is given in every step.
            controls: ControlNets, whose engines are open.

        Returns:
            The last latents, on the device and on the host; where the loop was ended, some.

        Raises:
            Sd35Error: the engine failed.
        """
        device, total = self._device, len(schedule.coefficients)
        values = schedule.constants(len(latents))
        constants = device.upload(step_constants(values))
        steps = self._steps(engines, latents, run_inputs, values)
        depth = _depth(device, latents.nbytes, total, watched)
        slots = self._slots.take(latents.shape, depth)
        pending: deque[tuple[int, Fetch, Buffer]] = deque()
        fetches: list[Fetch] = []
        copy = latents

        def look() -> bool:
            nonlocal copy
            index, fetch, denoised = pending.popleft()
            copy = fetch.wait()
            sigma = float(schedule.sigmas[index + 1])
            # Only one step more was queued: it has not overwritten this one's.
            fetch_denoised = functools.cache(lambda: device.download(denoised))
            return after_step(Step(index, total, sigma, copy, fetch_denoised))

        try:
            for i in range(total):
                context, modulation = next(conditioning)
                if context is None:
                    raise ValueError("the denoiser reads a text")
                if i == 0:
                    device.synchronize()  # so that the clock tells conditioning from denoising
                clock.lap("conditioning")
                inputs = StepInputs(constants[i], context, modulation)
                if i >= 2:
                    fetches[i - 2].fence()  # this step overwrites what was copied then
                kind = schedule.kind(i, controls is not None and controls.counts(i))
                if controls is not None and kind.controlled:
                    made = steps.residuals(controls.shape, controls.dtype)
                    controls.run(i, steps.latents(i), made)
                current, denoised = steps.run(i, inputs, kind)
                fetches.append(device.fetch(current, slots[i % depth] if slots else None))
                pending.append((i, fetches[-1], denoised))
                going = True
                while going and len(pending) >= depth:
                    going = look()
                clock.lap("denoise")
                if not going:
                    return current, copy
            while pending and look():
                pass
            return current, copy
        finally:
            for _, fetch, _ in pending:
                fetch.wait()
            device.synchronize()
            clock.lap("denoise")

    def _steps(
        self,
        engines: StepEngines | SplitRun,
        latents: np.ndarray,
        run: RunInputs,
        constants: Mapping[str, np.ndarray],
    ) -> DirectSteps | RecordedSteps | SplitSteps:
        if isinstance(engines, SplitRun):
            return engines.steps(latents, run, constants)
        if not (self._device.queues and engines.full.recordable):
            return DirectSteps(self._device, engines, latents, run, constants)
        # Graphs read what is shared where it is.
        key = (*latents.shape, *map(self._device.pointer, run.shared.values()))
        steps = self._recorded.pop(key, None)
        if steps is None or not steps.is_of(engines):
            if steps is not None:
                steps.close()
            steps = RecordedSteps(self._device, engines, latents, run, constants)
        self._recorded[key] = steps
        # Changes are large, and a budget has room for those of one run.
        most = 1 if self._limited and engines.remembers else _SHAPES
        while len(self._recorded) > most:
            self._recorded.popitem(last=False)[1].close()
        steps.begin(latents, run)
        return steps

    def forget(self) -> None:
        """Release graphs and their buffers; called before an engine that was recorded closes."""
        with contextlib.ExitStack() as closing:
            for steps in self._recorded.values():
                closing.callback(steps.close)
            self._recorded.clear()

    def close(self) -> None:
        """Release everything."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._slots.clear)
            closing.callback(self.forget)


def _depth(device: Device, nbytes: int, total: int, watched: bool) -> int:
    """How many steps are queued before the host looks at the oldest."""
    if not device.queues:
        return 1
    if watched:
        return 2
    return max(2, min(total, SLOT_BYTES // max(nbytes, 1)))
