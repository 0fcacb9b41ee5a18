"""Drawing the same prompts and seeds with two bundles, watching every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime import Pipeline, Step
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.sessions.session import Session, SessionOptions, open_session

from .metrics import relative_errors
from .onnx_graph import Arrays
from .watched_session import WatchedSession

# Images at a time, where the bundles allow it: more is no faster.
_BATCH = 16

# Steps of the first batch whose inputs are kept for the errors of single layers, and of how many
# images.
_FEEDS, _FEED_IMAGES = 4, 2


@dataclass(frozen=True)
class PictureSet:
    """What both bundles draw: caption i from seed ``seed + i``.

    Attributes:
        size: (width, height) in pixels.
        batch: inclusive range of images at a time.
        guidance: None is each bundle's default.
    """

    prompts: Sequence[str]
    seed: int
    steps: int
    size: tuple[int, int]
    batch: tuple[int, int]
    guidance: float | None = None

    def batches(self) -> Iterator[list[int]]:
        """Indices of the prompts, batch by batch; a short batch is filled with the last prompt."""
        low, high = self.batch
        width = max(low, min(high, _BATCH))
        for first in range(0, len(self.prompts), width):
            some = list(range(first, min(first + width, len(self.prompts))))
            yield some + [some[-1]] * (low - len(some))


@dataclass(frozen=True)
class ReferenceDrawing:
    """What the reference drew.

    Attributes:
        images: uint8 [n, H, W, 3].
        sigmas: noise level after each step, [steps].
        feeds: inputs of each component in the first batch; of the denoiser, at some steps.
        first: per step of the first batch, the denoiser's ``latents``, ``previous_denoised`` and
            ``denoised``.
    """

    images: np.ndarray
    sigmas: np.ndarray
    feeds: Mapping[str, Sequence[Arrays]]
    first: Sequence[Arrays]


@dataclass(frozen=True)
class CandidateDrawing:
    """What the compared bundle drew.

    Attributes:
        images: uint8 [n, H, W, 3].
        free: [steps, n], ‖z' − z‖ / ‖z‖ of the latents after each step, each bundle going on from
            its own.
        forced: [steps, images of the first batch], the error of the velocity that one step
            predicts from the reference's latents, ‖v' − v‖ / ‖v‖.
    """

    images: np.ndarray
    free: np.ndarray
    forced: np.ndarray


@dataclass(frozen=True)
class _BatchResult:
    """One batch: images uint8 [b, H, W, 3], latents float32 [steps, b, C, h, w], sigmas [steps]."""

    images: np.ndarray
    latents: np.ndarray
    sigmas: np.ndarray


def _draw(
    pipe: Pipeline, pictures: PictureSet, on_pictures: Callable[[float], None]
) -> Iterator[_BatchResult]:
    """Draw batch by batch.

    Raises:
        Sd35Error: names the bundle whose engine failed, or whose latents are not finite.
    """
    count = 0
    for indices in pictures.batches():
        real = len(set(indices))
        steps: list[tuple[float, np.ndarray]] = []

        def keep(step: Step, before: int = count, real: int = real, steps: list = steps) -> None:
            steps.append((step.sigma, step.latents[:real].copy()))
            on_pictures(before + real * (step.index + 1) / step.total)

        try:
            result = pipe.generate(
                [pictures.prompts[i] for i in indices],
                seed=[pictures.seed + i for i in indices],
                steps=pictures.steps,
                guidance=pictures.guidance,
                size=pictures.size,
                callback=keep,
            )
        except UsageError:
            raise
        except Sd35Error as error:
            raise Sd35Error(f"{pipe.bundle.root}: {error}") from error
        sigmas, latents = zip(*steps, strict=True)
        yield _BatchResult(result.images[:real], np.stack(latents), np.array(sigmas))
        count += real


def _spool(folder: Path, batch: int) -> Path:
    return folder / f"latents-{batch}.npy"


def draw_reference(
    bundle: Bundle, pictures: PictureSet, spool: Path, on_pictures: Callable[[float], None]
) -> ReferenceDrawing:
    """Draw with the reference.

    Args:
        spool: an empty folder; the latents of every step go to files there.
        on_pictures: called with the number of pictures that are done, between steps a fraction.
    """
    sampled = set(np.linspace(0, pictures.steps - 1, _FEEDS).round().astype(int).tolist())
    feeds: dict[str, list[Arrays]] = {}
    first: list[Arrays] = []

    def watch(
        bundle: Bundle, component: Component, device: Device, options: SessionOptions
    ) -> Session:
        def keep(inputs: Arrays, outputs: Arrays) -> None:
            some = feeds.setdefault(component.name, [])
            if component.name == "vae_decoder":
                inputs = {name: array[:_FEED_IMAGES] for name, array in inputs.items()}
            if component.name != "denoiser":
                if not some:
                    some.append(_copy(inputs, *inputs))
            elif len(first) < pictures.steps:
                if len(first) in sampled:
                    some.append({k: array[:_FEED_IMAGES].copy() for k, array in inputs.items()})
                step = _copy(inputs, "latents", "previous_denoised")
                first.append(step | _copy(outputs, "denoised"))

        return WatchedSession(open_session(bundle, component, device, options), device, after=keep)

    images = []
    with Pipeline(bundle, open_session=watch) as pipe:
        for number, batch in enumerate(_draw(pipe, pictures, on_pictures)):
            images.append(batch.images)
            np.save(_spool(spool, number), batch.latents)
    return ReferenceDrawing(np.concatenate(images), batch.sigmas, feeds, first)


def _copy(arrays: Arrays, *names: str) -> dict[str, np.ndarray]:
    return {name: arrays[name].copy() for name in names}


def draw_candidate(
    bundle: Bundle,
    pictures: PictureSet,
    reference: ReferenceDrawing,
    spool: Path,
    on_pictures: Callable[[float], None],
) -> CandidateDrawing:
    """Draw with the compared bundle, and its first batch once more on the reference's latents.

    Args:
        spool: where :func:`draw_reference` left its latents.
        on_pictures: as of :func:`draw_reference`; counts the pictures of the first batch twice.
    """
    forced: list[np.ndarray] = []
    forcing = True

    def watch(
        bundle: Bundle, component: Component, device: Device, options: SessionOptions
    ) -> Session:
        session = open_session(bundle, component, device, options)
        if component.name != "denoiser":
            return session

        def before(inputs: Arrays) -> Arrays:
            if not forcing:
                return inputs
            step = reference.first[len(forced)]
            return {**inputs, **{k: step[k] for k in ("latents", "previous_denoised")}}

        def after(inputs: Arrays, outputs: Arrays) -> None:
            if forcing:
                step = reference.first[len(forced)]
                # Velocity times sigma is latents minus denoised.
                mine, theirs = (step["latents"] - x["denoised"] for x in (outputs, step))
                forced.append(relative_errors(mine, theirs, (1, 2, 3)))

        return WatchedSession(session, device, before, after)

    images, free = [], []
    first = next(pictures.batches())
    real = len(set(first))
    with Pipeline(bundle, open_session=watch) as pipe:
        alone = dataclasses.replace(pictures, prompts=pictures.prompts[:real])
        for _ in _draw(pipe, alone, on_pictures):
            pass
        forcing = False
        for number, batch in enumerate(_draw(pipe, pictures, lambda n: on_pictures(real + n))):
            images.append(batch.images)
            expected = np.load(_spool(spool, number))
            free.append(relative_errors(batch.latents, expected, (2, 3, 4)))
    return CandidateDrawing(
        np.concatenate(images), np.concatenate(free, axis=1), np.stack(forced)[:, :real]
    )
