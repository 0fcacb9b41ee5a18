"""Text to image and image to image on a bundle's engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.step_cache import StepCache

from .adapters import AdapterShelf
from .arguments import cache_bytes, check_watchers, memory_bytes
from .fallback import Fallback, check_fallback
from .job import Job, Result, Step
from .process import HomeProcess, leave_at_exit
from .renderer import Renderer
from .request import EXACT, MAX_PROMPT_CHARS, Request, make_request
from .resident import MemoryReport, OpenSession
from .sessions.session import device_of, open_session
from .sizes import check_count, check_latents
from .source_pictures import pictures_of
from .text_features import PROMPT_CACHE_BYTES
from .timing import Clock
from .turn import Turn

if TYPE_CHECKING:
    import numpy as np

    # Loaded where pictures are made of arrays, or arrays of pictures: it takes a fifth of the
    # import.
    from PIL import Image

    from .controls import Control
    from .source_pictures import PictureLike


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
        max_prompt_chars: int = MAX_PROMPT_CHARS,
        prompt_cache: int = PROMPT_CACHE_BYTES,
    ) -> None:
        """As :meth:`load`; ``open_session`` may return sessions that watch or replace others."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._turn = Turn()
        self._home = HomeProcess()
        self._closed = False
        self._max_prompt_chars = max_prompt_chars
        self._shelf = AdapterShelf(bundle)
        if fallback is not None:
            check_fallback(bundle, fallback)
        with ExitStack() as opened:
            self._renderers: list[Renderer] = []
            for one in (bundle, fallback):
                if one is not None:
                    renderer = Renderer(
                        one, threads, open_session, device, vram_budget, prompt_cache
                    )
                    opened.callback(renderer.close)
                    self._renderers.append(renderer)
            self._renderer = self._renderers[0]
            self._fallback = Fallback(*self._renderers) if fallback is not None else None
            self._open = opened.pop_all()
        leave_at_exit(self)

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
        max_prompt_chars: int = MAX_PROMPT_CHARS,
        prompt_cache: int | str = PROMPT_CACHE_BYTES,
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
                Engines of ``onnxruntime`` run on either. Two, as ``cuda:0,cuda:1``, compute a
                branch of guidance each, with a bundle that was built with ``--split-guidance``;
                where the second is not there, or copies between them do not go directly, the first
                draws alone, with a warning.
            vram_budget: bytes of each device's memory to stay within, or as text: ``"8GiB"``.
                Engines that have no room beside others are loaded for their stage, or stream
                their weights. The planner counts weights, and working memory where the bundle
                knows it; see :meth:`memory`.
            trust_kernels: load compiled kernels that are in the bundle, or in the fallback. They
                are code: say so for bundles that you built, or whose builder you trust. Without,
                kernels come from the user's own cache, or are compiled.
            max_prompt_chars: of a prompt; a longer one is refused.
            prompt_cache: bytes of the host's memory for what the text encoders computed, or as
                text: ``"256MB"``. A prompt that is in it runs no text encoder. 0 keeps nothing.

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
        budget = None if vram_budget is None else memory_bytes("vram_budget", vram_budget)
        return cls(
            bundle, threads, fallback=other, device=device, vram_budget=budget,
            max_prompt_chars=max_prompt_chars, prompt_cache=cache_bytes(prompt_cache),
        )  # fmt: skip

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
        """Release every engine, when what is being drawn is done. The pipeline is not used
        afterwards; a second call does no harm.

        Raises:
            UsageError: it was called by a callback.
            Sd35Error: the device failed; everything is released all the same.
        """
        if not self._home.is_this:  # nothing of it is in this process
            return
        with self._turn.take("close()"):
            self._closed = True
            self._open.close()

    def leave(self) -> None:
        """Cancel what is being drawn and close: the process ends."""
        if self._home.is_this:
            for renderer in self._renderers:
                renderer.stopping = True
            self.close()

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Know an adapter by a name, for the ``adapters`` of requests. No engine loads for it; one
        of the same name is replaced, for requests that are made after.

        Args:
            path: a file that ``sd35-trt adapter convert`` wrote.

        Raises:
            UsageError: no such file, not an adapter, one of another model or of a larger rank than
                the bundle takes, or a bundle without adapters.
        """
        self._shelf.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter's name.

        Raises:
            UsageError: it is unknown.
        """
        self._shelf.unload(name)

    def preload(self) -> None:
        """Load every engine that stays in memory now, the fallback's excepted.

        Raises:
            BundleError: a file that an engine refuses.
            Sd35Error: the backend's package is not installed, or the pipeline is closed.
        """
        with self._own_turn("preload()"):
            self._renderer.open_all()

    def memory(self) -> MemoryReport:
        """What the engines and their device take; the fallback's not counted.

        Raises:
            Sd35Error: the pipeline is closed.
        """
        self._home.check("the pipeline")
        self._check_open()
        self._renderer.activate()
        return self._renderer.memory()

    @property
    def device(self) -> str:
        """Where it draws: ``cpu``, ``cuda:N``, or two with a comma between."""
        return self._renderer.device_name

    @property
    def anomalies(self) -> int:
        """How many anomalous images there were, the fallback's included."""
        return sum(renderer.anomalies for renderer in self._renderers)

    @property
    def on_fallback(self) -> bool:
        """Whether the fallback draws."""
        return self._fallback is not None and self._fallback.active

    def restore(self) -> None:
        """Draw with the bundle itself again, from the next request on."""
        # Without the lock, so that a callback or an observer may do it.
        if self._fallback is not None:
            self._fallback.restore()

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
            UsageError: an argument out of range; names the nearest that works. Or the call comes
                from a callback, or the pipeline was loaded before a fork.
            Cancelled: the callback returned False.
            NotFinite: an image is not finite, and there is no fallback that draws it.
            Sd35Error: an engine failed.
        """
        check_watchers(None, callback)
        job = Job(self.request(prompt, **arguments), callback)
        self.draw([job])
        if not isinstance(job.outcome, Result):
            raise job.outcome or Sd35Error("the request was not drawn", "report this")
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
        image: PictureLike | None = None,
        strength: float = 0.6,
        adapters: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        mask: PictureLike | None = None,
        paste: bool = False,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_start: float = 0.01,
        skip_layer_guidance_stop: float = 0.2,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_2: str | Sequence[str] | None = None,
        negative_3: str | Sequence[str] | None = None,
        weighting: bool = False,
        latents: np.ndarray | None = None,
        decode: bool = True,
        controls: Mapping[str, PictureLike | Control] | None = None,
        step_cache: str = EXACT,
    ) -> Request:
        """Check what is to be drawn, without drawing it.

        Args:
            prompt: one prompt, or several.
            negative: what to steer away from; one for all or one per prompt. Needs guidance.
            seed: the first image's, counting up from there, or one per image. The initial noise
                is that of ``torch.Generator("cpu").manual_seed(seed)``.
            steps: denoising steps, 1 to 1000; None takes the model's default, as below.
            guidance: classifier-free guidance scale, 0 to 100; up to 1 it is off.
            shift: timestep shift of the schedule, 0.01 to 100.
            size: (width, height) in pixels; with ``image``, its size.
            batch: images per prompt.
            sampler: ``euler`` or ``dpmpp-2m``.
            t5_tokens: length of the T5 part of the text.
            image: start from this image instead of noise alone: uint8 [H, W, 3] in RGB, PIL's, or
                the path of a file. It is taken upright, on white where it is transparent.
            strength: how much of ``image`` is redrawn, from one step to 1.
            adapters: how much of each adapter the images have: names of :meth:`load_adapter`, or
                paths of files, → scales, -100 to 100; or one such mapping for each image.
            mask: what of ``image`` is drawn anew: where it is light. A picture in grey or RGB, an
                array of booleans or uint8 [H, W], or the path of a file; it is resized to the
                image. Latent pixels outside stay the image's. Needs a bundle that was built with
                inpainting.
            paste: make the pixels outside the mask those of ``image`` itself, which the
                autoencoder alone would change a little.
            skip_guidance_layers: blocks that skip-layer guidance leaves out; None is without. For
                SD3.5 Medium, 7, 8 and 9 are usual. Needs guidance, and a bundle that was built
                with it.
            skip_layer_guidance_scale: how much of it, -100 to 100.
            skip_layer_guidance_start, skip_layer_guidance_stop: fractions of the steps between
                which it counts; only these steps cost more.
            prompt_2, prompt_3: what CLIP-G and T5 read instead of ``prompt``; one for all prompts
                or one each. None is the prompt.
            negative_2, negative_3: the same of ``negative``.
            weighting: read marks of weights in all prompts, as ComfyUI does: ``(word:1.3)``,
                ``(word)`` for 1.1; a parenthesis is then written with a backslash before it.
            latents: start from these in place of ``image``: float32 [C, h, w], or one for each
                image [B, C, h, w], as :attr:`Result.latents` and :meth:`encode` are. They have
                the size with them; ``strength`` and ``mask`` are as for ``image``.
            decode: False leaves out the result's images: its latents are what is wanted.
            controls: name of a ControlNet of the bundle → the picture that it follows, or a
                :class:`~sd35_trt.runtime.Control` with its scale and the steps that it runs in.
            step_cache: ``exact``, or ``fast``: steps that the bundle's step cache calls short
                compute the first blocks alone. A request that it has no plan for is drawn exactly,
                with a note. Needs a bundle that was built with short steps.

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
            max_prompt_chars=self._max_prompt_chars,
            adapters=adapters,
            shelf=self._shelf,
            mask=mask,
            paste=paste,
            skip_guidance_layers=skip_guidance_layers,
            skip_layer_guidance_scale=skip_layer_guidance_scale,
            skip_layer_guidance_start=skip_layer_guidance_start,
            skip_layer_guidance_stop=skip_layer_guidance_stop,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_2=negative_2,
            negative_3=negative_3,
            weighting=weighting,
            latents=latents,
            decode=decode,
            controls=controls,
            step_cache=step_cache,
            plans=self._renderers[0].step_cache,
        )

    def use_step_cache(self, cache: StepCache) -> None:
        """Take the short steps of later requests from another step cache than the bundle's.

        Args:
            cache: of this bundle's model and short steps. A fallback keeps its own.

        Raises:
            UsageError: it is of another model, or of other short steps.
        """
        cache.check(self.manifest, "the step cache")
        self._renderers[0].step_cache = cache

    def encode(
        self, image: PictureLike | list[PictureLike] | tuple[PictureLike, ...]
    ) -> np.ndarray:
        """Latents of pictures of one size, as ``latents`` of a request takes them.

        Args:
            image: as for :meth:`request`; or several, at most as many as the bundle draws at once.

        Returns:
            float32 [B, C, h, w].

        Raises:
            UsageError: no picture, of several sizes, or of a size that the bundle does not draw.
            Sd35Error: the pipeline is closed, or the engine failed.
        """
        images = pictures_of(image, self.manifest)
        with self._own_turn("encode()"):
            return self._renderer.encode(images)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of latents.

        Args:
            latents: float32 [C, h, w] or [B, C, h, w], finite; at most as many as the bundle draws
                at once.

        Returns:
            uint8 [B, H, W, 3].

        Raises:
            UsageError: another type or shape, a size that the bundle does not draw, or values that
                are not finite.
            Sd35Error: the pipeline is closed, or the engine failed.
        """
        batch = check_latents(latents, self.manifest)
        check_count(len(batch), self.manifest)
        with self._own_turn("decode()"):
            return self._renderer.decode(batch)

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
        with self._own_turn("generate()"):
            clock = Clock()
            for job in jobs:
                job.clock = clock
            (self._fallback or self._renderer).draw(jobs, clock)

    @contextmanager
    def _own_turn(self, what: str) -> Iterator[None]:
        """Alone with the engines, on their device."""
        self._home.check("the pipeline")
        with self._turn.take(what):
            self._check_open()
            self._renderer.activate()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise Sd35Error("the pipeline is closed", "load it again")
