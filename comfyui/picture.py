"""The node that draws whole pictures."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from sd35_trt.errors import UsageError

from .arrays import image_of, masks_of, pixels_of
from .prompt import text_inputs
from .sample import STEP_CACHES, sampling_inputs, step_cache_input
from .watching import Watcher
from .wires import CATEGORY, Model, ModelWire


class DrawPicture(io.ComfyNode):
    """Model and texts → IMAGE, bit by bit what :meth:`sd35_trt.runtime.Pipeline.generate` draws."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtPicture",
            display_name="Draw Picture (SD3.5 TRT)",
            category=CATEGORY,
            description="Text to image, image to image and inpainting in one node.",
            inputs=[
                ModelWire.Input("model"),
                *text_inputs(),
                io.Int.Input("width", default=1024, min=64, max=8192, step=64),
                io.Int.Input("height", default=1024, min=64, max=8192, step=64),
                io.Int.Input("batch_size", default=1, min=1, max=64),
                *sampling_inputs(),
                io.Image.Input(
                    "image", optional=True, tooltip="Start from this picture; it is resized."
                ),
                io.Float.Input(
                    "strength", default=0.6, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="How much of the picture is drawn anew; the part of the steps.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="What of the picture is drawn anew."
                ),
                io.Boolean.Input(
                    "paste", default=True, optional=True,
                    tooltip="Keep the pixels outside the mask as they are.",
                ),
                io.Boolean.Input(
                    "weighting", default=True, optional=True,
                    tooltip="Read (word:1.3) as a weight, as ComfyUI's own nodes do.",
                ),
                step_cache_input(),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Model,
        prompt: str,
        negative: str,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        shift: float,
        image: torch.Tensor | None = None,
        strength: float = 0.6,
        mask: torch.Tensor | None = None,
        paste: bool = True,
        weighting: bool = True,
        step_cache: str = STEP_CACHES[0],
    ) -> io.NodeOutput:
        arguments = {
            "prompt": prompt,
            "negative": negative,
            "size": (width, height),
            "batch": batch_size,
            "seed": seed,
            "steps": steps,
            "guidance": cfg,
            "sampler": sampler,
            "shift": shift or None,
            "weighting": weighting,
            "step_cache": step_cache,
            **model.arguments(),
            **_source(image, strength, mask, paste),
        }
        result = model.pipe.generate(callback=Watcher(1), **arguments)
        return io.NodeOutput(image_of(result.images))


def _source(
    image: torch.Tensor | None, strength: float, mask: torch.Tensor | None, paste: bool
) -> dict[str, Any]:
    """The arguments about what a picture starts from."""
    if image is None:
        if mask is not None:
            raise UsageError("a mask needs the picture that it is of", "connect image, too")
        return {}
    pixels = pixels_of(image)
    if len(pixels) != 1:
        raise UsageError(
            f"{len(pixels)} pictures to start from",
            "give one; the nodes VAE Encode and Sample take several",
        )
    source: dict[str, Any] = {"image": pixels[0], "strength": strength}
    if mask is not None:
        source |= {"mask": masks_of(mask)[0], "paste": paste}
    return source
