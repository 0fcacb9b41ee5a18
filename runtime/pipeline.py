"""Text to image and image to image on a bundle's engines."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from sd35_trt.bundle import Bundle, Component
from sd35_trt.errors import BundleError, Cancelled, Sd35Error, UsageError

from .noise import randn
from .request import Request, make_request
from .schedule import SAMPLERS, make_sigmas
from .session import Session, check_engines, open_session
from .text import PromptTokenizer

logger = logging.getLogger("sd35_trt")

# Modulation of this many bytes is computed in one run of the conditioner.
_MODULATION_CHUNK = 256 << 20

_PROMPT_CACHE = 256


@dataclass(frozen=True)
class Step:
    """What a callback sees after each denoising step.

    Attributes:
        index: 0 … total - 1.
        total: number of steps of this run.
        sigma: noise level after the step; 0 after the last.
        latents: float32 [B, C, h, w], the loop's own buffer: copy what you keep.
    """

    index: int
    total: int
    sigma: float
    latents: np.ndarray


@dataclass(frozen=True)
class Result:
    """Images and how they came about.

    Attributes:
        images: uint8 [B, H, W, 3].
        latents: float32 [B, C, h, w], what the VAE decoded.
        seeds: seed of each image.
        parameters: everything that would draw the same images again.
        timings: seconds by stage: ``text``, ``conditioning``, ``denoise``, ``decode``, ``total``.
        notes: what the user should know, such as a prompt that was cut.
    """

    images: np.ndarray
    latents: np.ndarray
    seeds: tuple[int, ...]
    parameters: dict[str, Any]
    timings: dict[str, float]
    notes: tuple[str, ...] = ()

    def pil(self) -> list[Image.Image]:
        """The images as PIL images."""
        return [Image.fromarray(image) for image in self.images]


@dataclass
class _Embeddings:
    """One prompt's text features: hidden [tokens, width] and pooled [pooled width]."""

    hidden: np.ndarray
    pooled: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass
class _Clock:
    timings: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.timings[stage] = self.timings.get(stage, 0.0) + now - self._last
        self._last = now


class Pipeline:
    """Draws from a bundle. Engines load at first use and stay; calls from threads take turns.

    Use :meth:`load`; a pipeline is also a context manager that closes its engines.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        open_session: Callable[[Bundle, Component, int | None], Session] = open_session,
    ) -> None:
        """As :meth:`load`; ``open_session`` may return sessions that watch or replace others."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._threads = threads
        self._open_session = open_session
        self._sessions: dict[str, Session] = {}
        self._prompts: OrderedDict[tuple[str, int], _Embeddings] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._tokenizers = {
            name: PromptTokenizer(bundle.path(t.path), t.pad_id)
            for name, t in self.manifest.tokenizers.items()
        }

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, verify: bool = False, threads: int | None = None
    ) -> Pipeline:
        """Open a bundle.

        Args:
            path: the bundle's directory.
            verify: compare the hashes of the large files too, not only their sizes.
            threads: CPU threads for each engine; None takes all cores.

        Raises:
            BundleError: missing, damaged, foreign, of another format version, or with engines
                that this version cannot run.
        """
        bundle = Bundle.open(path, verify=verify)
        check_engines(bundle)
        return cls(bundle, threads)

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
            self._closed = True
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()
            self._prompts.clear()

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
        callback: Callable[[Step], object] | None = None,
    ) -> Result:
        """Draw ``len(prompts) * batch`` images in one run.

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
            callback: called after every step; returning False cancels.

        Raises:
            UsageError: an argument out of range; names the nearest that works.
            Cancelled: the callback returned False.
            Sd35Error: an engine failed, or its output is not finite.
        """
        request = make_request(
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
        with self._lock:
            if self._closed:
                raise Sd35Error("the pipeline is closed", "load it again")
            return self._generate(request, callback)

    def _generate(self, request: Request, callback: Callable[[Step], object] | None) -> Result:
        start = time.perf_counter()
        clock = _Clock()
        guided = self.manifest.guided
        texts = [*request.negatives, *request.prompts] if guided else list(request.prompts)
        embeddings = self._encode(texts, request.t5_tokens)
        clock.lap("text")

        sigmas = make_sigmas(
            request.steps, request.shift, int(self.manifest.scheduler["num_train_timesteps"])
        )
        latents = self._noise(request)
        if request.image is not None:
            # As diffusers' StableDiffusion3Img2ImgPipeline: the first steps are left out.
            sigmas = sigmas[request.first_step :]
            encoded = self._run("vae_encoder", {"image": request.image}, **request.dims)["latents"]
            latents = (sigmas[0] * latents + (1 - sigmas[0]) * encoded).astype(np.float32)
            clock.lap("encode")
        latents = self._denoise(request, sigmas, latents, embeddings, callback, clock)
        if not np.isfinite(latents).all():
            raise Sd35Error(
                "the latents are not finite: the model overflows in this precision",
                "build the bundle with: --policy fp32",
            )
        images = self._run("vae_decoder", {"latents": latents}, **request.dims)["image"]
        clock.lap("decode")
        clock.timings["total"] = time.perf_counter() - start
        notes = tuple(dict.fromkeys(note for e in embeddings for note in e.notes))
        if any(request.negatives) and request.guidance == 1.0:
            notes += ("without guidance, the negative prompt has no effect",)
        for note in notes:
            logger.warning(note)
        return Result(images, latents, request.seeds, request.parameters(), clock.timings, notes)

    def _noise(self, request: Request) -> np.ndarray:
        shape = (1, self.manifest.latent_channels, *request.latent_size)
        return np.concatenate([randn(shape, seed) for seed in request.seeds])

    def _denoise(
        self,
        request: Request,
        sigmas: np.ndarray,
        latents: np.ndarray,
        embeddings: Sequence[_Embeddings],
        callback: Callable[[Step], object] | None,
        clock: _Clock,
    ) -> np.ndarray:
        count = len(request.seeds)
        coefficients = SAMPLERS[request.sampler](sigmas)
        pooled = np.stack([e.pooled for e in embeddings])
        hidden = np.stack([e.hidden for e in embeddings])
        # Two buffers of each, used in turn: what a step reads, the next one overwrites.
        current, following = latents, np.empty_like(latents)
        previous, denoised = np.zeros_like(latents), np.empty_like(latents)
        guidance = np.full(count, request.guidance, np.float32)
        denoiser = self._session("denoiser")
        conditioning = self._condition(hidden, pooled, sigmas[:-1])
        for i in range(len(coefficients)):
            context, modulation = next(conditioning)
            clock.lap("conditioning")
            inputs = {
                "latents": current,
                "sigma": np.full(count, sigmas[i], np.float32),
                "coefficients": np.tile(coefficients[i].astype(np.float32), (count, 1)),
                "previous_denoised": previous,
                "context": context[-count:],
                "modulation": modulation[-count:],
            }
            if self.manifest.guided:
                inputs |= {
                    "uncond_context": context[:count],
                    "uncond_modulation": modulation[:count],
                    "guidance": guidance,
                }
            denoiser.run(inputs, {"next_latents": following, "denoised": denoised})
            current, following = following, current
            previous, denoised = denoised, previous
            clock.lap("denoise")
            if callback is not None:
                step = Step(i, len(coefficients), float(sigmas[i + 1]), current)
                if callback(step) is False:
                    raise Cancelled(f"cancelled after step {i + 1} of {len(coefficients)}")
        return current

    def _condition(
        self, hidden: np.ndarray, pooled: np.ndarray, sigmas: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Context and modulation of each step; several steps are computed at a time."""
        timesteps = (sigmas * self.manifest.scheduler["num_train_timesteps"]).astype(np.float32)
        port = self._component("conditioner").output("modulation")
        samples, tokens = hidden.shape[:2]
        one_step = port.resolve(steps=1, samples=samples)
        step_bytes = int(np.prod(one_step)) * np.dtype(port.dtype).itemsize
        _, most = self._component("conditioner").bounds.get("steps", (1, len(timesteps)))
        chunk = max(1, min(most, _MODULATION_CHUNK // step_bytes))
        for first in range(0, len(timesteps), chunk):
            some = timesteps[first : first + chunk]
            out = self._run(
                "conditioner",
                {"prompt_embeds": hidden, "pooled": pooled, "timesteps": some},
                samples=samples,
                tokens=tokens,
                steps=len(some),
            )
            for modulation in out["modulation"]:
                yield out["context"], modulation

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
            out = self._run(name, {"input_ids": ids}, batch=len(texts), tokens=length)
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

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            component = self._component(name)
            self._sessions[name] = self._open_session(self.bundle, component, self._threads)
        return self._sessions[name]

    def _run(self, name: str, inputs: dict[str, np.ndarray], **dims: int) -> dict[str, np.ndarray]:
        """Run a component into new arrays."""
        ports = self._component(name).outputs
        outputs = {port.name: np.empty(port.resolve(**dims), port.dtype) for port in ports}
        self._session(name).run(inputs, outputs)
        return outputs
