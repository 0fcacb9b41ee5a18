"""Drawing with one bundle on one device: text, noise, the loop, pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np

from sd35_trt.components import SHORT_DENOISER, control_part
from sd35_trt.errors import Cancelled, NotFinite
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.contract import check_contract
from sd35_trt.formats.step_cache import StepCache

from .adapters import AdapterFeeder, AdapterInputs
from .autoencoder import Autoencoder
from .conditioning import Conditioning
from .control_steps import ControlRun
from .denoise import DenoiseLoop, Schedule
from .devices.device import Buffer
from .devices.opening import open_device, split_names
from .job import Job, Result, Step
from .latent_guard import Band, Guard
from .noise import randn
from .process import keep_from_forks
from .request import Request, join, least_request
from .resident import EngineSet, MemoryReport, OpenSession
from .run_inputs import Source, run_inputs
from .runner import ComponentRunner
from .schedule import coefficients, make_sigmas, mix
from .second_device import (
    SPLIT,
    SecondDevice,
    branch_engines,
    check_splits,
    open_second,
)
from .sessions.session import device_of
from .short_steps import PlannedStep, StepEngines
from .skip_layers import skip_scales
from .split_guidance import SplitGuidance, SplitRun
from .text_features import TextEncoder, TextFeatures
from .timing import Clock, now_ns

logger = logging.getLogger("sd35_trt")


class Renderer:
    """Draws jobs with a bundle's engines and watches their latents. One thread at a time.

    Args:
        threads, device, vram_budget, prompt_cache: see :meth:`sd35_trt.runtime.Pipeline.load`.
        open_session: loads an engine.

    Attributes:
        bundle: as given.
        engines: the bundle's.
        anomalies: how many anomalous images there were.
        step_cache: the bundle's; None where it has none.
        stopping: True cancels what is drawn, after its step.

    Raises:
        BundleError: components that cannot be drawn with, engines that do not run on this device,
            or a file that is no tokenizer.
        OutOfMemory: a budget that is too small for the smallest request.
        Sd35Error: there is no such device here.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None,
        open_session: OpenSession,
        device: str | None,
        vram_budget: int | None,
        prompt_cache: int,
    ) -> None:
        check_contract(bundle.manifest, bundle.root)
        self.bundle = bundle
        self.anomalies = 0
        self.stopping = False
        self._manifest = bundle.manifest
        self._band = Band.of(bundle)
        self.step_cache = StepCache.of(bundle)
        self._train_timesteps = int(self._manifest.scheduler.num_train_timesteps)
        with ExitStack() as opened:
            name, other = split_names(device)
            self._device = open_device(device_of(bundle, name))
            opened.callback(self._device.close)
            keep_from_forks(self._device)
            self._split: SplitGuidance | None = None
            self._second: SecondDevice | None = None
            if other is not None:
                check_splits(bundle)
                self._open_second(other, threads, open_session, vram_budget, opened)
            self.engines = EngineSet(
                bundle, self._device, vram_budget, threads, open_session, self._own_components()
            )
            opened.callback(self.engines.release)
            self._runner = ComponentRunner(bundle, self._device, self.engines)
            self._loop = DenoiseLoop(self._device, limited=vram_budget is not None)
            opened.callback(self._loop.close)
            for name in ("denoiser", SHORT_DENOISER, *SPLIT):
                self.engines.before_close(name, self._forget)
            within = None if vram_budget is None else self._forget
            self._feeder = AdapterFeeder(bundle, self._device, within)
            opened.callback(self._feeder.clear)
            self._text = TextEncoder(bundle, self._runner, self._feeder, prompt_cache)
            opened.callback(self._text.clear)
            self._conditioning = Conditioning(
                self._device, self.engines, self._runner, self._train_timesteps
            )
            self._vae = Autoencoder(self._device, self._runner, self._manifest)
            self.fit(least_request(self._manifest))
            opened.callback(self._device.activate)
            self._open = opened.pop_all()

    def _open_second(
        self,
        name: str,
        threads: int | None,
        open_session: OpenSession,
        budget: int | None,
        opened: ExitStack,
    ) -> None:
        """Open the second device, if it is there."""
        device = open_second(self._device, device_of(self.bundle, name))
        if device is None:
            return
        self._split = SplitGuidance((self._device, device), self._manifest)
        self._second = SecondDevice(
            self.bundle, device, budget, threads, open_session, self._split.forget
        )
        opened.callback(self._second.close)
        opened.callback(self._split.forget)
        self._device.activate()

    def _own_components(self) -> set[str]:
        """Those that run on its first device."""
        names = {component.name for component in self._manifest.components}
        return names - ({"denoiser", SHORT_DENOISER} if self._second else set(SPLIT))

    def _forget(self) -> None:
        """Release the loop's graphs and buffers."""
        self._loop.forget()
        if self._split is not None:
            self._split.forget()

    @property
    def device_name(self) -> str:
        """Of the device that it draws on, or of both."""
        return self._device.name + (f",{self._second.device.name}" if self._second else "")

    def open_all(self) -> None:
        """Open every engine that stays."""
        if self._second is not None:
            self._second.open_all()
            self._device.activate()
        self.engines.open_all()

    def memory(self) -> MemoryReport:
        """What is in memory now."""
        report = self.engines.memory()
        if self._second is None:
            return report
        second = self._second.memory()
        self._device.activate()
        return replace(report, second=second)

    def release(self) -> None:
        """Close every engine; they open again when they are used."""
        if self._second is not None:
            self._second.release()
            self._device.activate()
        self.engines.release()

    def activate(self) -> None:
        """Make its device the calling thread's."""
        self._device.activate()

    def fit(self, request: Request) -> None:
        """Make room for a request; see :meth:`sd35_trt.runtime.resident.EngineSet.fit`.

        Raises:
            OutOfMemory: the budget is too small.
        """
        texts = (2 if self._manifest.guided else 1) * len(request.seeds)
        rank = AdapterInputs.of(self._manifest, request.adapters).rank
        skipped = len(request.seeds) * any(skip is not None for skip in request.skips)
        self.engines.fit(
            {**request.dims, "samples": texts, "rank": rank, "skipped": skipped},
            [use.name for use in request.controls],
            bool(self._planned(request)),
        )
        if self._second is not None:
            self._second.fit({**request.dims, "rank": rank})
            self._device.activate()

    def draw(self, jobs: Sequence[Job], clock: Clock) -> None:
        """Draw jobs in one run and set the outcome of each; see
        :meth:`sd35_trt.runtime.Pipeline.draw`.

        Args:
            clock: its stages ``text``, ``encode``, ``conditioning``, ``denoise``, ``decode``.

        Raises:
            Sd35Error: an engine failed.
        """
        request = join([job.request for job in jobs])
        self.fit(request)
        ends = list(accumulate((len(job.request.seeds) for job in jobs), initial=0))
        parts = [slice(*bounds) for bounds in pairwise(ends)]
        guard = Guard(self._band, self._manifest, request)
        try:
            self._draw_parts(request, list(zip(jobs, parts, strict=True)), guard, clock)
        finally:
            self.anomalies += len(guard.anomalies)
            for anomaly in guard.anomalies.values():
                logger.warning("%s: %s", self.bundle.root, anomaly)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Latents of pictures; see :meth:`sd35_trt.runtime.Pipeline.encode`."""
        scale = self._manifest.latent_scale
        count, height, width, _ = images.shape
        self.engines.fit(self._vae.dims(count, height // scale, width // scale))
        return self._vae.encode(images)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of latents; see :meth:`sd35_trt.runtime.Pipeline.decode`."""
        count, _, height, width = latents.shape
        self.engines.fit(self._vae.dims(count, height, width))
        return self._vae.decode(latents)

    def _check_finite(self, job: Job, part: slice, guard: Guard) -> None:
        """End a job with an image that is not finite."""
        anomaly = next((a for a in guard.within(part) if not a.finite), None)
        if anomaly is None:
            return
        what = f"the latents are not finite after step {anomaly.step + 1} (seed {anomaly.seed})"
        if all(rule.precision == "fp32" for rule in self._manifest.policy.rules):
            job.outcome = NotFinite(what, "lower the guidance; the weights may be damaged, too")
        else:
            job.outcome = NotFinite(
                f"{what}: the model overflows in this precision",
                "build the bundle with: --policy fp32",
            )

    def _draw_parts(
        self, request: Request, parts: Sequence[tuple[Job, slice]], guard: Guard, clock: Clock
    ) -> None:
        """Draw a joined request; each job has its part of the images."""
        guided = self._manifest.guided
        texts = [*request.negatives, *request.prompts] if guided else list(request.prompts)
        adapters = AdapterInputs.of(self._manifest, request.adapters)
        mixes = request.adapters * (len(texts) // len(request.seeds))
        features = self._text.encode(texts, request.t5_tokens, mixes, adapters)
        clock.lap("text")
        sigmas = make_sigmas(request.steps, request.shift, self._train_timesteps)
        latents = noise = self._noise(request)
        source = request.latents if request.image is None else self._vae.encode(request.image)
        if source is not None:
            # As diffusers' StableDiffusion3Img2ImgPipeline: the first steps are left out.
            sigmas = sigmas[request.first_step :]
            latents = mix(noise, source, sigmas[0])
        controls = self._controls(request, len(sigmas) - 1)
        if source is not None or controls is not None:
            clock.lap("encode")

        def after_step(step: Step) -> bool:
            guard.look(step.index, step.sigma, step.latents)
            for job, part in parts:
                if job.outcome is None and self.stopping:
                    job.outcome = Cancelled("the request was cancelled: the process ends")
                if job.outcome is None:
                    self._check_finite(job, part, guard)
                if job.outcome is None:
                    job.after_step(step.part(part))
            return any(job.outcome is None for job, _ in parts)

        watched = any(job.callback is not None for job, _ in parts)
        last, latents = self._denoise(
            request, sigmas, latents, Source(source, noise), features, controls, after_step,
            watched, clock,
        )  # fmt: skip
        for job, part in parts:
            job.anomalies += guard.within(part)
        if all(job.outcome is not None for job, _ in parts):
            return
        images = self._images(request, last)
        clock.lap("decode")
        short = sum(step.coefficients is not None for step in self._planned(request))
        for job, part in parts:
            if job.outcome is None:
                count = len(request.seeds)
                branches = [features[i : i + count][part] for i in range(0, len(texts), count)]
                notes = _text_notes(job.request, branches)
                if self._second is not None and job.request.plan is not None:
                    notes.append("two devices compute every step in full")
                result = _result(job, images[part], latents[part], notes, clock)
                job.outcome = replace(result, short_steps=short)

    def _noise(self, request: Request) -> np.ndarray:
        shape = (1, self._manifest.latent_channels, *request.latent_size)
        return np.concatenate([randn(shape, seed) for seed in request.seeds])

    def _images(self, request: Request, latents: Buffer) -> np.ndarray:
        """uint8 [B, H, W, 3]; [0, H, W, 3] where nobody wants them."""
        if not request.decode:
            return np.empty((0, request.height, request.width, 3), np.uint8)
        images = self._vae.decode(latents)
        return _pasted(images, request) if request.paste else images

    def _controls(self, request: Request, steps: int) -> ControlRun | None:
        """The ControlNets of a run; None where none runs in any step."""
        every = range(steps)
        uses = [u for u in request.controls if any(u.counts(step, steps) for step in every)]
        if not uses:
            return None
        hints = [self._device.upload(self._vae.encode(use.pictures, use.name)) for use in uses]
        return ControlRun(self._device, self._manifest, uses, hints, steps)

    def _denoise(
        self,
        request: Request,
        sigmas: np.ndarray,
        latents: np.ndarray,
        source: Source,
        features: Sequence[TextFeatures],
        controls: ControlRun | None,
        after_step: Callable[[Step], bool],
        watched: bool,
        clock: Clock,
    ) -> tuple[Buffer, np.ndarray]:
        """Latents after the last step, or after that for which ``after_step`` returned False."""
        schedule = self._schedule(request, sigmas)
        adapters = AdapterInputs.of(self._manifest, request.adapters)
        mixes = request.adapters * (len(features) // len(request.seeds))
        nets = (control_part(use.name) for use in request.controls)
        denoisers = SPLIT if self._second else ("denoiser",)
        loop = (*denoisers, *([SHORT_DENOISER] if schedule.planned else []), *nets)
        conditioning = self._conditioning.begin(
            "conditioner", features, sigmas[:-1],
            self._feeder.ports("conditioner", adapters, mixes), loop,
        )  # fmt: skip
        if controls is not None:
            controls.condition(self._conditioning, features, sigmas)
        # Conditioners may be closed for it.
        engines = self._step_engines(request, source, bool(schedule.planned))
        if controls is not None:
            controls.open(self.engines)
        if request.decode:
            self.engines.load_ahead("vae_decoder", loop[0])
        ports = self._feeder.ports("denoiser", adapters, request.adapters)
        inputs = run_inputs(self._device, self._manifest, request, source, ports)
        return self._loop.run(
            engines, latents, schedule, conditioning, after_step, watched, clock, inputs, controls
        )  # fmt: skip

    def _step_engines(
        self, request: Request, source: Source, short: bool
    ) -> StepEngines | SplitRun:
        """The engines of a run's steps, open."""
        if self._split is None or self._second is None:
            shorter = self.engines.use(SHORT_DENOISER) if short else None
            return StepEngines(self._manifest, self.engines.use("denoiser"), shorter)
        theirs, inputs = self._second.engines(), self._second.inputs(request, source)
        self._device.activate()
        return SplitRun(self._split, (branch_engines(self.engines), theirs), inputs)

    def _schedule(self, request: Request, sigmas: np.ndarray) -> Schedule:
        features, steps = self._manifest.features, len(sigmas) - 1
        return Schedule(
            sigmas,
            coefficients(request.sampler, sigmas),
            skip_scales(request.skips, request.guidance, steps)
            if features.skip_layer_guidance
            else None,
            features.inpainting,
            self._planned(request) if features.short_steps else None,
        )

    def _planned(self, request: Request) -> tuple[PlannedStep, ...]:
        """The steps of a request that has short ones; as the fallback's, another bundle's may have
        no such steps, or others."""
        if self._second is not None:
            return ()
        own = self._manifest.features.short_steps == request.short_blocks
        return request.planned_steps if own else ()

    def close(self) -> None:
        """Release engines and device, all that there is also when a part of it fails to. A second
        call does no harm."""
        self._open.close()


def _pasted(images: np.ndarray, request: Request) -> np.ndarray:
    """Pictures whose pixels outside the mask are the source's."""
    if request.mask is None or request.image is None:
        return images
    return np.where(request.mask[..., None], images, request.image)


def _text_notes(request: Request, branches: Sequence[Sequence[TextFeatures]]) -> list[str]:
    """Notes on a request's texts, each named by what it is.

    Args:
        branches: features of the negatives where there is guidance, and of the prompts.
    """
    notes = []
    named = [("negative prompt", request.negatives), ("prompt", request.prompts)]
    for (kind, texts), branch in zip(named[-len(branches) :], branches, strict=True):
        unique = dict(zip(texts, branch, strict=True))
        for number, features in enumerate(unique.values(), 1):
            name = f"the {kind}" if len(unique) == 1 else f"{kind} {number}"
            notes += [f"{name} {note}" for note in features.notes]
    return notes


def _step_cache_notes(request: Request) -> list[str]:
    if not request.fast:
        return []
    if request.plan is None:
        about = f"{request.steps} steps of {request.sampler} with shift {request.shift:g}"
        return [f"the step cache has no plan for {about}: every step was a full one"]
    if not request.planned_steps:
        return [f"none of {request.drawn_steps} steps could be short: every step was a full one"]
    return []


def _control_notes(request: Request) -> list[str]:
    steps = request.drawn_steps
    return [
        f"none of {steps} steps is between {use.start:g} and {use.end:g}: the ControlNet "
        f"{use.name} did not run"
        for use in request.controls
        if not any(use.counts(step, steps) for step in range(steps))
    ]


def _skip_notes(request: Request) -> list[str]:
    skip, steps = request.skips[0], request.drawn_steps
    if skip is None:
        return []
    if request.guidance[0] == 1.0:
        return ["without guidance, skip-layer guidance has no effect"]
    if not any(skip.counts(step, steps) for step in range(steps)):
        between = f"{skip.start:g} and {skip.stop:g}"
        return [f"none of {steps} steps is between {between}: no layer was skipped"]
    return []


def _result(
    job: Job, images: np.ndarray, latents: np.ndarray, notes: Sequence[str], clock: Clock
) -> Result:
    request = job.request
    unique = list(dict.fromkeys(notes))
    if not all(negative.empty for negative in request.negatives) and request.guidance[0] == 1.0:
        unique.append("without guidance, the negative prompt has no effect")
    unique += [*_skip_notes(request), *_control_notes(request), *_step_cache_notes(request)]
    for note in unique:
        logger.warning(note)
    waited = (clock.start_ns - job.created_ns) / 1e9
    timings = {"queue": waited, **clock.seconds(), "total": (now_ns() - job.created_ns) / 1e9}
    return Result(
        # A view would keep the other jobs' images in memory.
        images.copy(),
        latents.copy(),
        request.seeds,
        request.parameters(),
        timings,
        (*unique, *map(str, job.anomalies)),
        tuple(job.anomalies),
    )
