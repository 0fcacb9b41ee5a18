"""Context and modulation of each step, computed by the conditioner several steps at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import numpy as np

from .devices.device import Buffer, Device
from .resident import EngineSet
from .runner import ComponentRunner
from .schedule import make_timesteps

# Modulation of at most so many bytes is computed in one run of the conditioner.
_CHUNK_BYTES = 256 << 20


class Conditioning:
    """What the denoiser is told of text and time.

    Args:
        device: that the engines run on.
        engines: the bundle's.
        runner: of its components.
        train_timesteps: the scheduler's ``num_train_timesteps``, by which sigmas become timesteps.
    """

    def __init__(
        self, device: Device, engines: EngineSet, runner: ComponentRunner, train_timesteps: int
    ) -> None:
        self._device = device
        self._engines = engines
        self._runner = runner
        self._train_timesteps = train_timesteps

    def steps(
        self,
        hidden: np.ndarray,
        pooled: np.ndarray,
        sigmas: np.ndarray,
        adapters: Mapping[str, Buffer] | None = None,
    ) -> Iterator[tuple[Buffer, Buffer]]:
        """Context [N, T, D] and modulation [N, R, D] of each step, in order.

        Args:
            hidden: text features [N, T, width].
            pooled: [N, pooled width].
            sigmas: [S], noise level before each step.
            adapters: inputs of the conditioner for them, by port; None where it takes none.

        Raises:
            Sd35Error: the conditioner failed.
        """
        timesteps = make_timesteps(sigmas, self._train_timesteps)
        samples, tokens = hidden.shape[:2]
        chunk = self._chunk(samples, len(timesteps))
        inputs = {
            "prompt_embeds": self._device.upload(hidden),
            "pooled": self._device.upload(pooled),
            **(adapters or {}),
        }

        def compute(first: int) -> dict[str, Buffer]:
            some = timesteps[first : first + chunk]
            feed = {**inputs, "timesteps": some}
            return self._runner.run(
                "conditioner", feed, samples=samples, tokens=tokens, steps=len(some)
            )

        starts = range(0, len(timesteps), chunk)
        if len(starts) == 1 or self._engines.keeps("conditioner", "denoiser"):
            for first in starts:
                out = compute(first)
                for i in range(len(out["modulation"])):
                    yield out["context"], out["modulation"][i]
            return
        # One of the two has to make room for the other: what the steps need waits on the host.
        chunks = []
        for first in starts:
            out = compute(first)
            chunks.append(self._device.download(out["modulation"]))
        for modulation in chain.from_iterable(chunks):
            yield out["context"], self._device.upload(modulation)

    def _chunk(self, samples: int, count: int) -> int:
        """How many of ``count`` steps one run computes."""
        conditioner = self._runner.component("conditioner")
        port = conditioner.output("modulation")
        one_step = port.resolve(steps=1, samples=samples)
        step_bytes = int(np.prod(one_step)) * np.dtype(port.dtype).itemsize
        _, most = conditioner.bounds.get("steps", (1, count))
        return max(1, min(most, _CHUNK_BYTES // step_bytes))
