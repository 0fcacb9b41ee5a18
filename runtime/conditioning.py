"""Context and modulation of each step, computed by the conditioner several steps at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from .devices.device import Buffer, Device
from .resident import EngineSet
from .runner import ComponentRunner
from .schedule import make_timesteps
from .text_features import TextFeatures

# Modulation of at most so many bytes is computed in one run of the conditioner.
_CHUNK_BYTES = 256 << 20


class StepConditioning(NamedTuple):
    """Of a step.

    Attributes:
        context: [N, T, D]; None of a ControlNet without a text stream.
        modulation: [N, R, D].
    """

    context: Buffer | None
    modulation: Buffer


class Conditioning:
    """What the denoiser, and ControlNets, are told of text and time.

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

    def begin(
        self,
        component: str,
        features: Sequence[TextFeatures],
        sigmas: np.ndarray,
        adapters: Mapping[str, Buffer] | None = None,
        beside: Sequence[str] = ("denoiser",),
    ) -> Iterator[StepConditioning]:
        """Context [N, T, D] and modulation [N, R, D] of each step, in order; computing begins.

        Args:
            component: the conditioner of the transformer, or of a ControlNet.
            features: of the text of each sample.
            sigmas: [S], noise level before each step.
            adapters: inputs of the conditioner for them, by port; None where it takes none.
            beside: components that run in every step.

        Raises:
            Sd35Error: the conditioner failed.
        """
        steps = self._steps(component, features, sigmas, adapters or {}, beside)
        return chain([*islice(steps, 1)], steps)

    def _steps(
        self,
        component: str,
        features: Sequence[TextFeatures],
        sigmas: np.ndarray,
        adapters: Mapping[str, Buffer],
        beside: Sequence[str],
    ) -> Iterator[StepConditioning]:
        timesteps = make_timesteps(sigmas, self._train_timesteps)
        ports = {port.name: port.dtype for port in self._runner.component(component).inputs}
        texts = {
            "prompt_embeds": np.stack([text.hidden for text in features]),
            "pooled": np.stack([text.pooled for text in features]),
        }
        samples, tokens = texts["prompt_embeds"].shape[:2]
        chunk = self._chunk(component, samples, len(timesteps))
        inputs = {
            **{
                name: self._device.upload(text.astype(ports[name], copy=False))
                for name, text in texts.items()
                if name in ports
            },
            **adapters,
        }

        def compute(first: int) -> dict[str, Buffer]:
            some = timesteps[first : first + chunk]
            feed = {**inputs, "timesteps": some}
            return self._runner.run(
                component, feed, samples=samples, tokens=tokens, steps=len(some)
            )

        starts = range(0, len(timesteps), chunk)
        if len(starts) == 1 or self._engines.keeps(component, *beside):
            for first in starts:
                out = compute(first)
                for i in range(len(out["modulation"])):
                    yield StepConditioning(out.get("context"), out["modulation"][i])
            return
        # One of them has to make room for the others: what the steps need waits on the host.
        chunks = []
        for first in starts:
            out = compute(first)
            chunks.append(self._device.download(out["modulation"]))
        for modulation in chain.from_iterable(chunks):
            yield StepConditioning(out.get("context"), self._device.upload(modulation))

    def _chunk(self, component: str, samples: int, count: int) -> int:
        """How many of ``count`` steps one run computes."""
        conditioner = self._runner.component(component)
        port = conditioner.output("modulation")
        one_step = port.resolve(steps=1, samples=samples)
        step_bytes = int(np.prod(one_step)) * np.dtype(port.dtype).itemsize
        _, most = conditioner.bounds.get("steps", (1, count))
        return max(1, min(most, _CHUNK_BYTES // step_bytes))
