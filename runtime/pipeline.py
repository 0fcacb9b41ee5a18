"""Text to image and image to image on a bundle's engines."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.errors import BundleError, NotFinite, Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.units import parse_bytes

from .denoise import DenoiseLoop, Schedule
from .devices.device import Buffer, open_device
from .job import Job, Result, Step
from .latent_guard import Band, Guard
from .noise import randn
from .request import Request, join, make_request
from .resident import EngineSet, MemoryReport, OpenSession
from .schedule import coefficients, make_sigmas, make_timesteps, mix
from .sessions.session import device_of, open_session
from .text import PromptTokenizer
from .timing import Clock, now_ns

if TYPE_CHECKING:
    # Loaded where pictures are made of arrays, or arrays of pictures: it takes a fifth of the
    # import.
    from PIL import Image

logger = logging.getLogger("sd35_trt")

# Modulation of this many bytes is computed in one run of the conditioner.
_MODULATION_CHUNK = 256 << 20

_PROMPT_CACHE = 256

# What runs after a component, for loading it meanwhile.
_NEXT = {"clip_l": "clip_g", "clip_g": "t5", "t5": "conditioner", "conditioner": "denoiser"}

# So many anomalous images in a row, and the fallback takes over.
_PATIENCE = 2


@dataclass
class _Embeddings:
    """One prompt's text features: hidden [tokens, width] and pooled [pooled width]."""

    hidden: np.ndarray
    pooled: np.ndarray
    notes: tuple[str, ...] = ()


class Pipeline:
    """Draws from a bundle. Engines load at first use and stay, unless a ``vram_budget`` says
    otherwise; calls from threads take turns.

    After every step each image's latents are checked: they must be finite and, where the bundle
    holds a calibration, their mean and deviation like those seen there. Images that are not are
    *anomalous*; they are logged, counted and noted in the result. After two in a row, a pipeline
    with a fallback draws with that until :meth:`restore`.

    Use :meth:`load`; a pipeline is also a context manager that closes its engines.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        open_session: OpenSession = open_session,
        fallback: Bundle | None = None,
        device: str | None = None,
        vram_budget: int | None = None,
    ) -> None:
        """As :meth:`load`; ``open_session`` may return sessions that watch or replace others."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._prompts: OrderedDict[tuple[str, int], _Embeddings] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._tokenizers = {
            name: PromptTokenizer(bundle.path(t.path), t.pad_id)
            for name, t in self.manifest.tokenizers.items()
        }
        self._band = Band.of(bundle)
        self._anomalies = 0
        self._in_a_row = 0
        self._on_fallback = False
        self._fallback: Pipeline | None = None
        if fallback is not None:
            _check_fallback(bundle, fallback)
        self._device = open_device(device_of(bundle, device))
        try:
            self._engines = EngineSet(bundle, self._device, vram_budget, threads, open_session)
            self._loop = DenoiseLoop(self._device)
            self._fit(self.request("", batch=self.manifest.ranges.batch[0]))
            if fallback is not None:
                self._fallback = Pipeline(
                    fallback, threads, open_session, device=device, vram_budget=vram_budget
                )
        except BaseException:
            self._device.close()
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = False,
        threads: int | None = None,
        fallback: str | os.PathLike[str] | None = None,
        device: str | None = None,
        vram_budget: int | str | None = None,
        trust_kernels: bool = False,
    ) -> Pipeline:
        """Open a bundle.

        Args:
            path: the bundle's directory.
            verify: compare the hashes of the large files too, not only their sizes.
            threads: CPU threads for each engine; None takes all cores.
            fallback: a bundle of the same model, most often in a higher precision. A request
                with an image that is not finite is drawn again with it at once, and after two
                anomalous images in a row every request is. Its engines load when it is needed.
            device: ``cpu``, ``cuda`` or ``cuda:N``; None takes what the bundle was built for.
                Engines of ``onnxruntime`` run on either.
            vram_budget: bytes of the device's memory to stay within, or as text: ``"8GiB"``.
                Engines that have no room beside others are loaded for their stage, or stream
                their weights. The planner counts weights, and working memory where the bundle
                knows it; see :meth:`memory`.
            trust_kernels: load compiled kernels that are in the bundle, or in the fallback. They
                are code: say so for bundles that you built, or whose builder you trust. Without,
                kernels come from the user's own cache, or are compiled.

        Raises:
            BundleError: missing, damaged, foreign, of another format version, with engines that
                this version cannot run, or a fallback that cannot draw what the bundle draws.
            OutOfMemory: a budget that is too small; names the smallest that is enough.
            Sd35Error: there is no such device here.
        """
        bundle = Bundle.open(path, verify, trust_kernels)
        device_of(bundle, device)
        other = None
        if fallback is not None:
            other = Bundle.open(fallback, verify, trust_kernels)
            device_of(other, device)
        budget = parse_bytes(vram_budget) if isinstance(vram_budget, str) else vram_budget
        return cls(bundle, threads, fallback=other, device=device, vram_budget=budget)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release every engine. The pipeline is not used afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._device.activate()
            self._loop.close()
            self._engines.close()
            self._prompts.clear()
            self._device.close()
            if self._fallback is not None:
                self._fallback.close()

    def preload(self) -> None:
        """Load every engine that stays in memory now, the fallback's excepted.

        Raises:
            BundleError: a file that an engine refuses.
            Sd35Error: the backend's package is not installed, or the pipeline is closed.
        """
        with self._lock:
            self._check_open()
            self._device.activate()
            self._engines.open_all()

    def memory(self) -> MemoryReport:
        """What the engines and their device take; the fallback's not counted.

        Raises:
            Sd35Error: the pipeline is closed.
        """
        self._check_open()
        self._device.activate()
        return self._engines.memory()

    @property
    def anomalies(self) -> int:
        """How many anomalous images there were, the fallback's included."""
        return self._anomalies + (self._fallback.anomalies if self._fallback else 0)

    @property
    def on_fallback(self) -> bool:
        """Whether the fallback draws."""
        return self._on_fallback

    def restore(self) -> None:
        """Draw with the bundle itself again, from the next request on."""
        # Without the lock, so that a callback or an observer may do it.
        self._in_a_row = 0
        self._on_fallback = False

    def __call__(self, prompt: str, **arguments: Any) -> Image.Image:
        """Draw one image; arguments as for :meth:`generate`."""
        result = self.generate(prompt, **arguments)
        if len(result.images) != 1:
            raise UsageError("pipe(...) draws one image", "use pipe.generate(...) for several")
        return result.pil()[0]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        callback: Callable[[Step], object] | None = None,
        **arguments: Any,
    ) -> Result:
        """Draw ``len(prompts) * batch`` images in one run.

        Args:
            prompt: one prompt, or several.
            callback: called after every step; returning False cancels. When a request is drawn
                again by the fallback, steps count from 0 again.
            arguments: see :meth:`request`.

        Raises:
            UsageError: an argument out of range; names the nearest that works.
            Cancelled: the callback returned False.
            NotFinite: an image is not finite, and there is no fallback that draws it.
            Sd35Error: an engine failed.
        """
        job = Job(self.request(prompt, **arguments), callback)
        self.draw([job])
        assert job.outcome is not None
        if isinstance(job.outcome, Exception):
            raise job.outcome
        return job.outcome

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        sampler: str | None = None,
        t5_tokens: int | None = None,
        image: Image.Image | np.ndarray | None = None,
        strength: float = 0.6,
    ) -> Request:
        """Check what is to be drawn, without drawing it.

        Args:
            prompt: one prompt, or several.
            negative: what to steer away from; one for all or one per prompt. Needs guidance.
            seed: the first image's, counting up from there, or one per image. The initial noise
                is that of ``torch.Generator("cpu").manual_seed(seed)``.
            steps: denoising steps, 1 to 1000; None takes the model's default, as below.
            guidance: classifier-free guidance scale; 1.0 turns it off.
            shift: timestep shift of the schedule.
            size: (width, height) in pixels; with ``image``, its size.
            batch: images per prompt.
            sampler: ``euler`` or ``dpmpp-2m``.
            t5_tokens: length of the T5 part of the text.
            image: start from this RGB image (uint8 [H, W, 3] or PIL) instead of noise alone.
            strength: how much of ``image`` is redrawn, 0 to 1.

        Raises:
            UsageError: an argument out of range; names the nearest that works.
        """
        return make_request(
            self.manifest,
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            shift=shift,
            size=size,
            batch=batch,
            sampler=sampler,
            t5_tokens=t5_tokens,
            image=image,
            strength=strength,
        )

    def draw(self, jobs: Sequence[Job]) -> None:
        """Draw several requests in one run and set the outcome of each.

        Args:
            jobs: one, or several whose requests agree in
                :attr:`~sd35_trt.runtime.request.Request.in_common` and have together no more
                images than the bundle draws at once.

        Raises:
            Sd35Error: the pipeline is closed, or an engine failed; jobs whose outcome was known
                before then have it.
        """
        with self._lock:
            self._check_open()
            self._device.activate()
            clock = Clock()
            for job in jobs:
                job.clock = clock
            if self._fallback is not None and self._on_fallback:
                self._fall_back_on(self._fallback, jobs, clock)
                _add_note(jobs, f"drawn with the fallback {self._fallback.bundle.root}")
                return
            self._draw(jobs, clock)
            if self._fallback is not None:
                self._fall_back(jobs, clock, self._fallback)

    def _fall_back(self, jobs: Sequence[Job], clock: Clock, fallback: Pipeline) -> None:
        """Switch to the fallback where it is time, and draw again what is not finite."""
        for job in jobs:
            if not isinstance(job.outcome, (Result, NotFinite)):
                continue  # cancelled: nothing is known of its images
            anomalous = {anomaly.image for anomaly in job.anomalies}
            for image in range(len(job.request.seeds)):
                self._in_a_row = self._in_a_row + 1 if image in anomalous else 0
                if self._in_a_row == _PATIENCE:
                    self._on_fallback = True
                    logger.error(
                        "%s: %d anomalous images in a row; drawing with %s until restore()",
                        self.bundle.root, _PATIENCE, fallback.bundle.root,
                    )  # fmt: skip
        again = [job for job in jobs if isinstance(job.outcome, NotFinite)]
        if again:
            for job in again:
                job.outcome = None
            self._fall_back_on(fallback, again, clock)
            _add_note(again, f"drawn again with the fallback {fallback.bundle.root}")

    def _fall_back_on(self, fallback: Pipeline, jobs: Sequence[Job], clock: Clock) -> None:
        if self._engines.budget is not None:
            # It is for one of the two at a time.
            self._engines.release()
        fallback._device.activate()
        fallback._draw(jobs, clock)
        if self._engines.budget is not None:
            fallback._engines.release()
        self._device.activate()

    def _check_open(self) -> None:
        if self._closed:
            raise Sd35Error("the pipeline is closed", "load it again")

    def _draw(self, jobs: Sequence[Job], clock: Clock) -> None:
        request = join([job.request for job in jobs])
        self._fit(request)
        ends = list(accumulate((len(job.request.seeds) for job in jobs), initial=0))
        parts = [slice(*bounds) for bounds in pairwise(ends)]
        guard = Guard(self._band, request)
        try:
            self._draw_parts(request, list(zip(jobs, parts, strict=True)), guard, clock)
        finally:
            self._anomalies += len(guard.anomalies)
            for anomaly in guard.anomalies.values():
                logger.warning("%s: %s", self.bundle.root, anomaly)

    def _fit(self, request: Request) -> None:
        """Make room for a request; see :meth:`EngineSet.fit`."""
        texts = (2 if self.manifest.guided else 1) * len(request.seeds)
        self._engines.fit({**request.dims, "samples": texts})

    def _draw_parts(
        self, request: Request, parts: Sequence[tuple[Job, slice]], guard: Guard, clock: Clock
    ) -> None:
        """Draw a joined request; each job has its part of the images."""
        guided = self.manifest.guided
        texts = [*request.negatives, *request.prompts] if guided else list(request.prompts)
        embeddings = self._encode(texts, request.t5_tokens)
        clock.lap("text")

        sigmas = make_sigmas(
            request.steps, request.shift, int(self.manifest.scheduler.num_train_timesteps)
        )
        latents = self._noise(request)
        if request.image is not None:
            # As diffusers' StableDiffusion3Img2ImgPipeline: the first steps are left out.
            sigmas = sigmas[request.first_step :]
            out = self._run("vae_encoder", {"image": request.image}, **request.dims)
            encoded = self._device.download(out["latents"])
            latents = mix(latents, encoded.astype(np.float32), sigmas[0])
            clock.lap("encode")

        def after_step(step: Step) -> bool:
            guard.look(step.index, step.sigma, step.latents)
            for job, part in parts:
                if job.outcome is None:
                    _check_finite(job, part, guard)
                if job.outcome is None:
                    job.after_step(replace(step, latents=step.latents[part]))
            return any(job.outcome is None for job, _ in parts)

        watched = any(job.callback is not None for job, _ in parts)
        last, latents = self._denoise(
            request, sigmas, latents, embeddings, after_step, watched, clock
        )
        for job, part in parts:
            job.anomalies += guard.within(part)
        if all(job.outcome is not None for job, _ in parts):
            return
        images = self._device.download(
            self._run("vae_decoder", {"latents": last}, **request.dims)["image"]
        )
        clock.lap("decode")
        for job, part in parts:
            if job.outcome is None:
                known = [embeddings[i:][part] for i in range(0, len(texts), len(request.seeds))]
                notes = [note for some in known for e in some for note in e.notes]
                job.outcome = self._result(job, images[part], latents[part], notes, clock)

    def _result(
        self,
        job: Job,
        images: np.ndarray,
        latents: np.ndarray,
        notes: Sequence[str],
        clock: Clock,
    ) -> Result:
        request = job.request
        told = list(dict.fromkeys(notes))
        if any(request.negatives) and request.guidance[0] == 1.0:
            told.append("without guidance, the negative prompt has no effect")
        for note in told:
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
            (*told, *map(str, job.anomalies)),
            tuple(job.anomalies),
        )

    def _noise(self, request: Request) -> np.ndarray:
        shape = (1, self.manifest.latent_channels, *request.latent_size)
        return np.concatenate([randn(shape, seed) for seed in request.seeds])

    def _denoise(
        self,
        request: Request,
        sigmas: np.ndarray,
        latents: np.ndarray,
        embeddings: Sequence[_Embeddings],
        after_step: Callable[[Step], bool],
        watched: bool,
        clock: Clock,
    ) -> tuple[Buffer, np.ndarray]:
        """Latents after the last step, or after that for which ``after_step`` returned False."""
        guidance = np.array(request.guidance, np.float32) if self.manifest.guided else None
        schedule = Schedule(sigmas, coefficients(request.sampler, sigmas), guidance)
        pooled = np.stack([e.pooled for e in embeddings])
        hidden = np.stack([e.hidden for e in embeddings])
        conditioning = self._condition(hidden, pooled, sigmas[:-1])
        first = next(conditioning)
        # The conditioner may be closed for it.
        denoiser = self._engines.use("denoiser")
        self._engines.load_ahead("vae_decoder", "denoiser")
        return self._loop.run(
            denoiser, latents, schedule, chain([first], conditioning), after_step, watched, clock
        )

    def _condition(
        self, hidden: np.ndarray, pooled: np.ndarray, sigmas: np.ndarray
    ) -> Iterator[tuple[Buffer, Buffer]]:
        """Context and modulation of each step; several steps are computed at a time."""
        timesteps = make_timesteps(sigmas, self.manifest.scheduler.num_train_timesteps)
        port = self._component("conditioner").output("modulation")
        samples, tokens = hidden.shape[:2]
        one_step = port.resolve(steps=1, samples=samples)
        step_bytes = int(np.prod(one_step)) * np.dtype(port.dtype).itemsize
        _, most = self._component("conditioner").bounds.get("steps", (1, len(timesteps)))
        chunk = max(1, min(most, _MODULATION_CHUNK // step_bytes))
        inputs = {
            "prompt_embeds": self._device.upload(hidden),
            "pooled": self._device.upload(pooled),
        }

        def compute(first: int) -> dict[str, Buffer]:
            some = timesteps[first : first + chunk]
            feed = {**inputs, "timesteps": some}
            return self._run("conditioner", feed, samples=samples, tokens=tokens, steps=len(some))

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

    def _encode(self, texts: Sequence[str], t5_tokens: int) -> list[_Embeddings]:
        """Text features of each text; those not seen before are computed in one batch."""
        new = [t for t in dict.fromkeys(texts) if (t, t5_tokens) not in self._prompts]
        if new:
            for text, embedding in zip(new, self._encode_new(new, t5_tokens), strict=True):
                self._prompts[text, t5_tokens] = embedding
        result = []
        for text in texts:
            self._prompts.move_to_end((text, t5_tokens))
            result.append(self._prompts[text, t5_tokens])
        while len(self._prompts) > _PROMPT_CACHE:
            self._prompts.popitem(last=False)
        return result

    def _encode_new(self, texts: Sequence[str], t5_tokens: int) -> list[_Embeddings]:
        conditioner = self._component("conditioner")
        pooled_port, embeds_port = conditioner.input("pooled"), conditioner.input("prompt_embeds")
        clip_tokens = self.manifest.tokenizers["clip_l"].length
        tokens = clip_tokens + t5_tokens
        # SD3: CLIP-L beside CLIP-G, padded with zeros to T5's width, followed by T5. Without T5
        # its part stays zero.
        hidden = np.zeros(embeds_port.resolve(samples=len(texts), tokens=tokens), embeds_port.dtype)
        pooled = []
        notes: list[list[str]] = [[] for _ in texts]
        channel = 0
        for name in ("clip_l", "clip_g", "t5"):
            if self.manifest.component(name) is None:
                continue
            length = t5_tokens if name == "t5" else clip_tokens
            ids, counts = self._tokenizers[name](texts, length)
            found = self._run(name, {"input_ids": ids}, batch=len(texts), tokens=length)
            out = {key: self._device.download(buffer) for key, buffer in found.items()}
            if name == "t5":
                hidden[:, clip_tokens:] = out["hidden"]
            else:
                width = out["hidden"].shape[-1]
                hidden[:, :clip_tokens, channel : channel + width] = out["hidden"]
                channel += width
                pooled.append(out["pooled"])
            if name != "clip_g":  # has CLIP-L's vocabulary
                for note, text, count in zip(notes, texts, counts, strict=True):
                    if count > length:
                        shown = text if len(text) <= 40 else f"{text[:37]}..."
                        note.append(
                            f"prompt {shown!r} has {count} {name} tokens, "
                            f"the model reads {length}; the rest is ignored"
                        )
        vectors = np.concatenate(pooled, axis=-1).astype(pooled_port.dtype)
        return [_Embeddings(h, p, tuple(n)) for h, p, n in zip(hidden, vectors, notes, strict=True)]

    def _component(self, name: str) -> Component:
        component = self.manifest.component(name)
        if component is None:
            raise BundleError(f"{self.bundle.root} has no {name}", "build it again")
        return component

    def _run(
        self, name: str, inputs: Mapping[str, np.ndarray | Buffer], **dims: int
    ) -> dict[str, Buffer]:
        """Run a component into new buffers, on arrays or buffers."""
        session = self._engines.use(name)
        device = self._device
        feed: dict[str, Buffer] = {
            key: device.upload(value) if isinstance(value, np.ndarray) else value
            for key, value in inputs.items()
        }
        ports = self._component(name).outputs
        outputs = {port.name: device.empty(port.resolve(**dims), port.dtype) for port in ports}
        if name in _NEXT:
            self._engines.load_ahead(_NEXT[name], name)
        session.run(feed, outputs)
        return outputs


def _check_finite(job: Job, part: slice, guard: Guard) -> None:
    """End a job with an image that is not finite."""
    anomaly = next((a for a in guard.within(part) if not a.finite), None)
    if anomaly is not None:
        job.outcome = NotFinite(
            f"the latents are not finite after step {anomaly.step + 1} (seed {anomaly.seed}): the "
            "model overflows in this precision",
            "build the bundle with: --policy fp32",
        )


def _add_note(jobs: Sequence[Job], note: str) -> None:
    for job in jobs:
        if isinstance(job.outcome, Result):
            job.outcome = replace(job.outcome, notes=(*job.outcome.notes, note))


def _check_fallback(bundle: Bundle, fallback: Bundle) -> None:
    """Refuse a fallback that cannot draw whatever the bundle can.

    Raises:
        BundleError: says in what they differ.
    """
    mine, its = bundle.manifest, fallback.manifest
    what = None
    if its.model.variant != mine.model.variant:
        what = f"is {its.model.variant}, {bundle.root} is {mine.model.variant}"
    elif mine.guided and not its.guided:
        what = f"was built without guidance, {bundle.root} with it"
    elif not its.ranges.include(mine.ranges):
        what = f"accepts fewer batches, sizes or text lengths than {bundle.root}"
    if what is not None:
        raise BundleError(
            f"the fallback {fallback.root} {what}", "build one with the same model and options"
        )
