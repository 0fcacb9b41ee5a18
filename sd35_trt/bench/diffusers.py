"""diffusers' pipeline as a contender, on a bundle's own checkpoint."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Scheduler

from .contenders import Run, step_seconds
from .options import DIFFUSERS, DIFFUSERS_COMPILED
from .workload import Workload

if TYPE_CHECKING:
    import torch


class DiffusersContender:
    """``StableDiffusion3Pipeline``.

    Its transformer computes the conditioning in every step, so that it has no stages
    ``conditioning`` and ``denoise``, but their sum ``loop``. It encodes the empty negative prompt
    in every run.

    Args:
        checkpoint: a diffusers model directory.
        scheduler: in place of the model's own.
        t5: whether to load the T5 encoder.
        compiled: the transformer's blocks by ``torch.compile``, when they run first.
        single: FP32 on a GPU too; the CPU always computes in FP32. Else BF16, or FP16 where the
            GPU has no BF16.
    """

    def __init__(
        self,
        checkpoint: Path,
        scheduler: Scheduler,
        workload: Workload,
        t5: bool,
        single: bool,
        compiled: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._scheduler = scheduler
        self._workload = workload
        self._t5 = t5
        self._compiled = compiled
        self._single = single or workload.device == "cpu"
        self._pipe: Any = None
        self._dtype: torch.dtype | None = None
        self._encoded = 0.0

    def load(self) -> float:
        """Read the weights and take them to the device; importing the libraries is not timed.

        Raises:
            Sd35Error: the bundle runs on a GPU that PyTorch cannot use.
        """
        import diffusers
        import torch
        import transformers

        if self._workload.device != "cpu" and not torch.cuda.is_available():
            raise Sd35Error(
                f"PyTorch {torch.__version__} sees no GPU here", "install PyTorch for CUDA"
            )
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        # Before the clock starts: naming it imports it.
        pipeline = diffusers.StableDiffusion3Pipeline
        from sd35_trt.calibration.diffusers_pipeline import diffusers_scheduler

        scheduler = diffusers_scheduler(self._scheduler)
        torch.set_num_threads(self._workload.threads)
        if self._single:
            self._dtype = torch.float32
        else:
            half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
            self._dtype = half
        absent = {} if self._t5 else {"text_encoder_3": None, "tokenizer_3": None}
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._pipe = pipeline.from_pretrained(
                self._checkpoint,
                scheduler=scheduler,
                dtype=self._dtype,
                local_files_only=True,
                **absent,
            ).to(self._workload.device)
        self._synchronize()
        seconds = time.perf_counter() - start
        if self._compiled:
            for block in self._pipe.transformer.transformer_blocks:
                block.compile()
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.encode_prompt = self._timed(self._pipe.encode_prompt)
        return seconds

    def _timed(self, encode: Any) -> Any:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            result = encode(*args, **kwargs)
            self._synchronize()
            self._encoded = time.perf_counter()
            return result

        return encode_prompt

    def draw(self, prompt: str, seed: int) -> Run:
        """See :class:`sd35_trt.bench.contenders.Contender`."""
        import torch

        ends: list[float] = []

        def after_step(*_: Any) -> dict[str, Any]:
            self._synchronize()
            ends.append(time.perf_counter())
            return {}

        w = self._workload
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(w.batch)]
        start = time.perf_counter()
        pictures = self._pipe(
            prompt,
            num_images_per_prompt=w.batch,
            num_inference_steps=w.steps,
            guidance_scale=w.guidance,
            width=w.size[0],
            height=w.size[1],
            max_sequence_length=w.t5_tokens,
            generator=generators,
            callback_on_step_end=after_step,
        ).images
        end = time.perf_counter()
        timings = {
            "text": self._encoded - start,
            "loop": ends[-1] - self._encoded,
            "decode": end - ends[-1],
            "total": end - start,
        }
        images = np.stack([np.asarray(picture) for picture in pictures])
        return Run(timings, step_seconds(ends, timings["loop"]), images)

    def describe(self) -> dict[str, Any]:
        """Which checkpoint, in which arithmetic."""
        return {
            "kind": DIFFUSERS_COMPILED if self._compiled else DIFFUSERS,
            "path": str(self._checkpoint),
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    def close(self) -> None:
        """Release the weights."""
        self._pipe = None

    def _synchronize(self) -> None:
        if self._workload.device != "cpu":
            import torch

            torch.cuda.synchronize()
