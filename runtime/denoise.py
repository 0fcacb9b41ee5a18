"""The denoise loop: latents stay on the device, the host looks at copies behind it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .device import Buffer, Device, Fetch, Graph
from .job import Step
from .session import Session
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
        sigmas = device.upload(np.repeat(schedule.sigmas[:-1, None], count, axis=1))
        coefficients = device.upload(np.repeat(schedule.coefficients[:, None], count, axis=1))
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
                inputs = {
                    "sigma": sigmas[i],
                    "coefficients": coefficients[i],
                    "context": context[-count:],
                    "modulation": modulation[-count:],
                }
                if guidance is not None:
                    inputs["uncond_context"] = context[:count]
                    inputs["uncond_modulation"] = modulation[:count]
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

    def run(self, index: int, inputs: Mapping[str, Buffer]) -> Buffer:
        """Queue a step; returns the buffer of its latents."""
        read, write = index % 2, 1 - index % 2
        feed = {
            **inputs,
            "latents": self._latents[read],
            "previous_denoised": self._denoised[write],
        }
        if self._guidance is not None:
            feed["guidance"] = self._guidance
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
        self._inputs: dict[str, Buffer] = {}
        self._placed: dict[str, int] = {}  # input → address of what it was copied from
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

    def run(self, index: int, inputs: Mapping[str, Buffer]) -> Buffer:
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

    def _place(self, inputs: Mapping[str, Buffer]) -> None:
        """Copy a step's inputs to where the graphs read them."""
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        if shapes != {name: buffer.shape for name, buffer in self._inputs.items()}:
            self._forget()  # another length of text
            self._inputs = {n: self._device.empty(b.shape, b.dtype) for n, b in inputs.items()}
        for name, buffer in inputs.items():
            address = self._device.pointer(buffer)
            if self._placed.get(name) != address:  # the text is the same in every step
                self._device.copy(buffer, self._inputs[name])
                self._placed[name] = address

    def _compute(self, turn: int) -> None:
        feed = {
            **self._inputs,
            "latents": self._latents[turn],
            "previous_denoised": self._denoised[1 - turn],
        }
        if self._guidance is not None:
            feed["guidance"] = self._guidance
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
