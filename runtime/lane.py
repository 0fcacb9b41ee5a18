"""What one of two devices computes of a step: its branch, and what follows from both."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35_trt.components import BRANCH_DENOISER, COMBINE
from sd35_trt.formats.bundle import RESIDUALS, Manifest

from .denoise_steps import RunInputs, StepFeeder, StepInputs, StepKind, step_constants
from .devices.device import Buffer, Device
from .devices.peer_copies import Copy
from .recorder import Recorder
from .sessions.session import Session

#: What each branch denoised, by the input of what combines them: without text, and with.
BRANCHES = ("uncond_denoised", "cond_denoised")


@dataclass(frozen=True)
class BranchEngines:
    """The engines of a lane.

    Attributes:
        branch: of the branch.
        combine: of what follows from both.
    """

    branch: Session
    combine: Session

    @property
    def recordable(self) -> bool:
        """See :class:`sd35_trt.runtime.sessions.session.Session`."""
        return self.branch.recordable and self.combine.recordable


class Lane:
    """Buffers on a device, where graphs find them, and the work on them.

    Args:
        branch: which of :data:`BRANCHES` it computes, 0 or 1.
        manifest: of the bundle.
        shape: of the latents, [B, C, h, w].
        run: inputs of the run, on this device.
        constants: ports that :func:`~sd35_trt.runtime.denoise_steps.step_constants` is given.
    """

    def __init__(
        self,
        device: Device,
        engines: BranchEngines,
        branch: int,
        manifest: Manifest,
        shape: tuple[int, ...],
        run: RunInputs,
        constants: Collection[str],
    ) -> None:
        self.device = device
        self.engines = engines
        self._branch = branch
        self._inputs = {
            name: {port.name for port in component.inputs}
            for name in (BRANCH_DENOISER, COMBINE)
            if (component := manifest.component(name)) is not None
        }
        self._shared = run.shared
        self._own = {name: device.empty(b.shape, b.dtype) for name, b in run.own.items()}
        self._none = run.no_residuals
        self._residuals: Buffer | None = None
        self._feeder = StepFeeder(device, shape[0], RunInputs({}, {}), constants)
        self._latents = [device.empty(shape, np.float32) for _ in range(2)]
        self._denoised = [device.empty(shape, np.float32) for _ in range(2)]
        self._branches = [device.empty(shape, np.float32) for _ in BRANCHES]
        self._constants: Buffer | None = None
        self._step: StepInputs | None = None
        self._recorder = Recorder(device, device.queues and engines.recordable)

    def begin(
        self, latents: np.ndarray, run: RunInputs, constants: Mapping[str, np.ndarray]
    ) -> None:
        """Take a new batch of the same shape."""
        device = self.device
        device.copy(device.upload(latents), self._latents[0])
        device.copy(device.upload(np.zeros_like(latents)), self._denoised[1])
        for name, buffer in run.own.items():
            device.copy(buffer, self._own[name])
        self._constants = device.upload(step_constants(constants))

    def place(self, inputs: StepInputs, text: bool) -> Iterator[Copy]:
        """Where a step's text and time go, and what of them is this branch's.

        Args:
            inputs: of both branches.
            text: whether the text is another one than in the step before.
        """
        if self._step is None or self._step.context.nbytes * 2 != inputs.context.nbytes:
            self._recorder.forget()
            constants = self.device.empty(inputs.constants.shape, inputs.constants.dtype)
            context, modulation = map(self._like_half, (inputs.context, inputs.modulation))
            self._step = StepInputs(constants, context, modulation)
        if text:
            yield Copy(self._step.context, self._half(inputs.context))
        yield Copy(self._step.modulation, self._half(inputs.modulation))

    def place_residuals(self, residuals: Buffer) -> Iterator[Copy]:
        """Where what ControlNets made goes, and what of it is this branch's.

        Args:
            residuals: [n, 2 B, T, D].
        """
        count, samples, *rest = residuals.shape
        shape = (count, samples // 2, *rest)
        if self._residuals is None or self._residuals.shape != shape:
            self._recorder.forget()
            self._residuals = self.device.empty(shape, residuals.dtype)
        for block in range(count):
            yield Copy(self._residuals[block], self._half(residuals[block]))

    def _half(self, both: Buffer) -> Any:
        count = len(both) // 2
        return both[self._branch * count : (self._branch + 1) * count]

    def _like_half(self, both: Buffer) -> Buffer:
        return self.device.empty((len(both) // 2, *both.shape[1:]), both.dtype)

    @property
    def own_branch(self) -> Buffer:
        """What its branch denoised."""
        return self._branches[self._branch]

    @property
    def other_branch(self) -> Buffer:
        """Where what the other one denoised has to come to."""
        return self._branches[1 - self._branch]

    def latents(self, turn: int) -> Buffer:
        """One of two buffers: what steps of this turn read, and the others write."""
        return self._latents[turn]

    def denoised(self, turn: int) -> Buffer:
        """One of two buffers: what steps of this turn write, and the others read."""
        return self._denoised[turn]

    def denoise(self, index: int, kind: StepKind) -> None:
        """Queue the branch of a step."""
        if self._step is None or self._constants is None:
            raise ValueError("a lane begins, and is given its step, first")
        self.device.copy(self._constants[index], self._step.constants)
        feed = self._feed(BRANCH_DENOISER, index % 2, kind)
        self._recorder.run(
            (BRANCH_DENOISER, index % 2, kind),
            lambda: self.engines.branch.run(feed, {"denoised": self.own_branch}),
        )

    def combine(self, index: int, kind: StepKind) -> None:
        """Queue what follows from both branches."""
        turn = index % 2
        feed = self._feed(COMBINE, turn, kind)
        outputs = {"next_latents": self._latents[1 - turn], "denoised": self._denoised[turn]}
        self._recorder.run((COMBINE, turn), lambda: self.engines.combine.run(feed, outputs))

    def _feed(self, component: str, turn: int, kind: StepKind) -> dict[str, Buffer]:
        if self._step is None:
            raise ValueError("a lane is given its step first")
        everything = {
            **self._feeder.ports(self._step, kind),
            **self._own,
            **self._shared,
            **dict(zip(BRANCHES, self._branches, strict=True)),
            "latents": self._latents[turn],
            "previous_denoised": self._denoised[1 - turn],
        }
        residuals = self._residuals if kind.controlled else self._none
        if residuals is not None:
            everything[RESIDUALS] = residuals
        return {name: everything[name] for name in self._inputs[component]}

    def close(self) -> None:
        """Release the graphs."""
        self.device.synchronize()
        self._recorder.forget()
