"""The node that denoises, in place of ComfyUI's KSampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from comfy_api.latest import io

from sd35_trt.errors import UsageError

from .arrays import latent_of, latents_of, masks_of
from .watching import Watcher
from .wires import CATEGORY, Model, ModelWire, Prompt, PromptWire

SAMPLERS = ["euler", "dpmpp-2m"]
STEP_CACHES = ["exact", "fast"]

_MOST_STEPS = 1000
# Pixels of a latent pixel.
_SCALE = 8
# Above, KSampler takes the whole schedule.
_WHOLE = 0.9999


def sampling_inputs() -> list[Any]:
    """Seed, steps, guidance, sampler and shift."""
    return [
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
        io.Int.Input("steps", default=28, min=1, max=_MOST_STEPS),
        io.Float.Input(
            "cfg", default=4.5, min=0.0, max=100.0, step=0.1, round=0.01,
            tooltip="Guidance; up to 1 it is off. Bundles without guidance take 1.",
        ),
        io.Combo.Input("sampler", options=SAMPLERS, default=SAMPLERS[0]),
        io.Float.Input(
            "shift", default=0.0, min=0.0, max=100.0, step=0.01,
            tooltip="Shift of the timesteps; 0 is the model's own.",
        ),
    ]  # fmt: skip


def step_cache_input() -> Any:
    """Whether steps may be short."""
    return io.Combo.Input(
        "step_cache", options=STEP_CACHES, default=STEP_CACHES[0], optional=True,
        tooltip="fast: with the short steps that the bundle was built and calibrated with.",
    )  # fmt: skip


class Sample(io.ComfyNode):
    """Model, prompt and LATENT → LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtSample",
            display_name="Sample (SD3.5 TRT)",
            category=CATEGORY,
            description="Denoises latents with a bundle. A noise mask says what is drawn anew.",
            inputs=[
                ModelWire.Input("model"),
                PromptWire.Input("prompt"),
                io.Latent.Input("latent", tooltip="Empty for text to image."),
                *sampling_inputs(),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="As KSampler's: the steps are the last of steps / denoise.",
                ),
                step_cache_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Model,
        prompt: Prompt,
        latent: Mapping[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        shift: float,
        denoise: float,
        step_cache: str = STEP_CACHES[0],
    ) -> io.NodeOutput:
        if denoise <= 0:
            return io.NodeOutput(latent)
        start = Start.of(latent, seed)
        part = {**part_of_schedule(steps, denoise), "decode": False}
        own = {
            "guidance": cfg,
            "sampler": sampler,
            "shift": shift or None,
            "step_cache": step_cache,
            **part,
        }
        arguments = {**prompt.arguments, **model.arguments(), **own}
        runs = list(start.runs(model.most, denoise <= _WHOLE))
        watcher = Watcher(len(runs))
        drawn = []
        for run in runs:
            drawn.append(model.pipe.generate(callback=watcher, **arguments, **run).latents)
            watcher.next_run()
        samples = latent_of(np.concatenate(drawn))
        return io.NodeOutput({**latent, "samples": samples})


@dataclass(frozen=True)
class Start:
    """What a LATENT begins with.

    Attributes:
        latents: float32 [B, 16, h, w].
        seeds: of each image.
        masks: uint8 [B, H, W]; None where all is drawn.
    """

    latents: np.ndarray
    seeds: list[int]
    masks: np.ndarray | None

    @classmethod
    def of(cls, latent: Mapping[str, Any], seed: int) -> Start:
        """An image's seed is the first one's and the image's place in the batch."""
        latents = latents_of(latent)
        places = latent.get("batch_index") or range(len(latents))
        mask = latent.get("noise_mask")
        masks = None
        if mask is not None:
            masks = masks_of(mask)
            # As ComfyUI: too few are repeated.
            masks = masks[np.arange(len(latents)) % len(masks)]
        return cls(latents, [seed + place for place in places], masks)

    def runs(self, most: int, partly: bool) -> Iterator[dict[str, Any]]:
        """Arguments of each run.

        Args:
            most: images of one.
            partly: whether the latents matter, as the schedule begins after its start.
        """
        first = 0
        while first < len(self.seeds):
            end = self._end(first, most)
            run: dict[str, Any] = {"seed": self.seeds[first:end], "batch": end - first}
            if self.masks is not None:
                run["mask"] = self.masks[first]
            if partly or self.masks is not None:
                run["latents"] = self.latents[first:end]
            else:
                run["size"] = self.latents.shape[3] * _SCALE, self.latents.shape[2] * _SCALE
            yield run
            first = end

    def _end(self, first: int, most: int) -> int:
        """Of the images from ``first`` on that one run draws: their mask is the same."""
        end = min(first + most, len(self.seeds))
        if self.masks is None:
            return end
        same = (i for i in range(first, end) if (self.masks[i] != self.masks[first]).any())
        return next(same, end)


def part_of_schedule(steps: int, denoise: float) -> dict[str, Any]:
    """The last ``steps`` of ``int(steps / denoise)``, as KSampler takes them.

    Returns:
        ``steps`` and ``strength`` of :meth:`sd35_trt.runtime.Pipeline.request`.

    Raises:
        UsageError: the runtime's schedules are shorter.
    """
    total = steps if denoise > _WHOLE else int(steps / denoise)
    if total > _MOST_STEPS:
        raise UsageError(
            f"{steps} steps with denoise {denoise:g} are the last of {total}, "
            f"and a schedule has at most {_MOST_STEPS}",
            "take fewer steps, or more denoise",
        )
    # In the middle between two numbers of steps, where rounding is harmless.
    return {"steps": total, "strength": (steps - 0.5) / total}
