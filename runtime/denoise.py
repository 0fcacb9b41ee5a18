"""The denoise loop: latents stay on the device, the host looks at copies behind it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .devices.device import Buffer, Device, Fetch, Graph
from .job import Step
from .sessions.session import Session
from .timing import Clock

# Host memory for copies of latents that nobody has looked at yet.
_SLOT_BYTES = 256 << 20

# Shapes whose buffers and graphs are kept.
_SHAPES = 2


@dataclass(frozen=True)
class Schedule:
    """What changes from step to step, known before the loop.

    Attributes:
        sigmas: float32 [S + 1], of a step and, last, after it.
        coefficients: float32 [S, 3], see :mod:`sd35_trt.runtime.schedule`.
        guidance: float32 [B], of each image; None where the engine has no such input.
    """

    sigmas: np.ndarray
    coefficients: np.ndarray
    guidance: np.ndarray | None


class DenoiseLoop:
    """Denoising on one engine. Where the engine's work can be recorded, a step is the replay of
    a graph.

    Steps are queued ahead of what the host has seen: by one where somebody looks at each, else by
    as many as there is memory for. The device never waits for the host.

    Args:
        device: that the engine runs on.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._recorded: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()

    def run(
        self,
        session: Session,
        latents: np.ndarray,
        schedule: Schedule,
        conditioning: Iterator[tuple[Buffer, Buffer]],
        after_step: Callable[[Step], bool],
        watched: bool,
        clock: Clock,
    ) -> tuple[Buffer, np.ndarray]:
        """Denoise a batch.

        Args:
            session: the ``denoiser``.
            latents: float32 [B, C, h, w], noise or what it was mixed with.
            conditioning: of each step context [N, T, D] and modulation [N, R, D]; with guidance
                N is 2 B, the unconditional branch first.
            after_step: called once per step, in order; False ends the loop.
            watched: whether somebody acts on what ``after_step`` sees.
            clock: its stages ``conditioning`` and ``denoise``.

        Returns:
            The last latents, on the device and on the host; where the loop was ended, some.

        Raises:
            Sd35Error: the engine failed.
        """
        device, total = self._device, len(schedule.coefficients)
        count = len(latents)
        constants = device.upload(_constants(schedule, count))
        guidance = None if schedule.guidance is None else device.upload(schedule.guidance)
        steps = self._steps(session, latents, guidance)
        depth = _depth(device, latents.nbytes, total, watched)
        slots: list[np.ndarray | None] = [*device.slots(latents.shape, np.float32, depth)]
        pending: deque[tuple[int, Fetch]] = deque()
        fetches: list[Fetch] = []
        seen = latents

        def look() -> bool:
            nonlocal seen
            index, fetch = pending.popleft()
            seen = fetch.wait()
            return after_step(Step(index, total, float(schedule.sigmas[index + 1]), seen))

        try:
            for i in range(total):
                context, modulation = next(conditioning)
                if i == 0:
                    device.synchronize()  # so that the clock tells conditioning from denoising
                clock.lap("conditioning")
                inputs = _Inputs(constants[i], context, modulation)
                if i >= 2:
                    fetches[i - 2].fence()  # this step overwrites what was copied then
                current = steps.run(i, inputs)
                fetches.append(device.fetch(current, slots[i % depth] if slots else None))
                pending.append((i, fetches[-1]))
                going = True
                while going and len(pending) >= depth:
                    going = look()
                clock.lap("denoise")
                if not going:
                    return current, seen
            while pending and look():
                pass
            return current, seen
        finally:
            for _, fetch in pending:
                fetch.wait()
            device.synchronize()
            clock.lap("denoise")

    def _steps(
        self, session: Session, latents: np.ndarray, guidance: Buffer | None
    ) -> _Direct | _Recorded:
        if not (self._device.queues and session.recordable):
            return _Direct(self._device, session, latents, guidance)
        key = latents.shape
        found = self._recorded.pop(key, None)
        if found is None or found.session is not session:
            if found is not None:
                found.close()
            found = _Recorded(self._device, session, latents, guidance)
        self._recorded[key] = found
        while len(self._recorded) > _SHAPES:
            self._recorded.popitem(last=False)[1].close()
        found.begin(latents, guidance)
        return found

    def close(self) -> None:
        """Release graphs and their buffers; called before an engine that was recorded closes."""
        while self._recorded:
            self._recorded.popitem()[1].close()


class _Inputs(NamedTuple):
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
        found: dict[str, Buffer] = {
            "sigma": self.constants[:count],
            "coefficients": self.constants[count:].reshape((count, 3)),
            "context": self.context[-count:],
            "modulation": self.modulation[-count:],
        }
        if guidance is not None:
            found["uncond_context"] = self.context[:count]
            found["uncond_modulation"] = self.modulation[:count]
            found["guidance"] = guidance
        return found


def _constants(schedule: Schedule, count: int) -> np.ndarray:
    """Those of every step [S, 4 B]; see :class:`_Inputs`."""
    sigmas = np.repeat(schedule.sigmas[:-1, None], count, axis=1)
    coefficients = np.tile(schedule.coefficients, (1, count))
    return np.concatenate([sigmas, coefficients], axis=1).astype(np.float32)


def _depth(device: Device, nbytes: int, total: int, watched: bool) -> int:
    """How many steps are queued before the host looks at the oldest."""
    if not device.queues:
        return 1
    if watched:
        return 2
    return max(2, min(total, _SLOT_BYTES // max(nbytes, 1)))


class _Direct:
    """Steps that the engine computes from where the inputs are."""

    def __init__(
        self, device: Device, session: Session, latents: np.ndarray, guidance: Buffer | None
    ) -> None:
        self._session = session
        self._guidance = guidance
        # Two buffers of each, used in turn: what a step reads, the next one overwrites.
        self._latents = [device.upload(latents.copy()), device.empty(latents.shape, np.float32)]
        self._denoised = [device.empty(latents.shape, np.float32),
                          device.upload(np.zeros_like(latents))]  # fmt: skip

    def run(self, index: int, inputs: _Inputs) -> Buffer:
        """Queue a step; returns the buffer of its latents."""
        read, write = index % 2, 1 - index % 2
        feed = {
            **inputs.ports(self._latents[read].shape[0], self._guidance),
            "latents": self._latents[read],
            "previous_denoised": self._denoised[write],
        }
        outputs = {"next_latents": self._latents[write], "denoised": self._denoised[read]}
        self._session.run(feed, outputs)
        return self._latents[write]


class _Recorded:
    """Steps that replay graphs, one for each turn of the two buffers, on inputs that are copied to
    where the graphs read them.

    The first two steps of a shape run directly: engines allocate and choose kernels then.
    """

    def __init__(
        self, device: Device, session: Session, latents: np.ndarray, guidance: Buffer | None
    ) -> None:
        self.session = session
        self._device = device
        self._latents = [device.empty(latents.shape, np.float32) for _ in range(2)]
        self._denoised = [device.empty(latents.shape, np.float32) for _ in range(2)]
        self._guidance = None if guidance is None else device.empty(guidance.shape, guidance.dtype)
        self._inputs: _Inputs | None = None
        self._placed: list[int] = []  # addresses of what they were copied from
        self._graphs: list[Graph | None] = [None, None]
        self._ran = [False, False]
        self._scratch_version = device.scratch_version

    def begin(self, latents: np.ndarray, guidance: Buffer | None) -> None:
        """Take a new batch of the same shape."""
        device = self._device
        self._placed.clear()
        device.copy(device.upload(latents), self._latents[0])
        device.copy(device.upload(np.zeros_like(latents)), self._denoised[1])
        if guidance is not None:
            assert self._guidance is not None
            device.copy(guidance, self._guidance)

    def run(self, index: int, inputs: _Inputs) -> Buffer:
        """Queue a step; returns the buffer of its latents."""
        self._place(inputs)
        turn = index % 2
        if self._device.scratch_version != self._scratch_version:
            self._forget()
        graph = self._graphs[turn]
        if graph is None and self._ran[turn]:
            graph = self._graphs[turn] = self._device.capture(lambda: self._compute(turn))
        if graph is None:
            self._compute(turn)
            self._ran[turn] = True
        else:
            graph.replay()
        return self._latents[1 - turn]

    def _place(self, inputs: _Inputs) -> None:
        """Copy a step's inputs to where the graphs read them."""
        # The text may be of another length.
        if self._inputs is None or self._inputs.context.shape != inputs.context.shape:
            self._forget()
            self._inputs = _Inputs(*(self._device.empty(b.shape, b.dtype) for b in inputs))
            self._placed = []
        addresses = [self._device.pointer(buffer) for buffer in inputs]
        for k, address in enumerate(addresses):
            if not self._placed or self._placed[k] != address:  # the text's is the same
                self._device.copy(inputs[k], self._inputs[k])
        self._placed = addresses

    def _compute(self, turn: int) -> None:
        assert self._inputs is not None
        feed = {
            **self._inputs.ports(self._latents[turn].shape[0], self._guidance),
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
