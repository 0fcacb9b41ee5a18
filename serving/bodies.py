"""What a request for pictures may say: OpenAI's fields, and ours beside them.

A field that would not be followed is refused: no client is left to think that it was.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sd35_trt.runtime.request import MAX_STEPS
from sd35_trt.runtime.schedule import SAMPLERS

from .controls import FIELD, ControlBody, FormControl
from .texts import Text

_LARGEST_SEED = 2**64 - 1

# Of a seed that nobody gave: any client's numbers hold it.
_RANDOM_SEEDS = 2**32

# Of a list, or of a mapping.
_MOST_ENTRIES = 64

# Fields that are arguments of the runtime by the same name.
_AS_THEY_ARE = (
    "prompt_2",
    "prompt_3",
    "weighting",
    "t5_tokens",
    "step_cache",
    "skip_guidance_layers",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_start",
    "skip_layer_guidance_stop",
)

#: As many as there can be steps to show.
MOST_PARTIAL_IMAGES = 100


class Body(BaseModel):
    """Fields of both endpoints. JSON's numbers are numbers, and no text is one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    prompt: Text = Field(description="What to draw.")
    model: Text | None = Field(None, description="A bundle's name; else the traffic decides.")
    n: int = Field(1, ge=1, description="Pictures; as many as the bundle draws at once.")
    size: Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")] | None = Field(
        None, description="Width x height in pixels; auto is the model's."
    )
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = Field(
        None, description="Accepted for clients that send it; steps decides."
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Accepted for clients that send it; nothing is moderated."
    )
    user: Text | None = Field(None, description="Keeps a user on one bundle.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=MOST_PARTIAL_IMAGES, description="With stream: previews, evenly spaced."
    )
    progress: bool = Field(False, description="With stream: an event for each step.")
    negative_prompt: Text | None = Field(None, description="What to steer away from.")
    prompt_2: Text | None = Field(None, description="What CLIP-G reads instead.")
    prompt_3: Text | None = Field(None, description="What T5 reads instead.")
    negative_prompt_2: Text | None = Field(None, description="The same to steer away from.")
    negative_prompt_3: Text | None = Field(None, description="The same to steer away from.")
    weighting: bool = Field(False, description="Read weights in prompts: (word:1.3).")
    adapters: dict[Text, float] | None = Field(
        None, max_length=_MOST_ENTRIES, description="Names of adapters of the server, and scales."
    )
    control: Mapping[Text, ControlBody] | None = Field(
        None, max_length=_MOST_ENTRIES, description="Pictures that ControlNets follow, by net."
    )
    seed: int | None = Field(
        None, ge=0, le=_LARGEST_SEED, description="Of the first picture; the next count up."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=100)
    shift: float | None = Field(None, ge=0.01, le=100)
    sampler: Text | None = Field(None, json_schema_extra={"examples": list(SAMPLERS)})
    step_cache: Literal["exact", "fast"] = Field(
        "exact", description="fast: with the bundle's short steps."
    )
    t5_tokens: int | None = Field(None, ge=1, description="Length of T5's part of the text.")
    skip_guidance_layers: list[int] | None = Field(
        None, max_length=_MOST_ENTRIES, description="Blocks that skip-layer guidance leaves out."
    )
    skip_layer_guidance_scale: float = Field(2.8, ge=-100, le=100)
    skip_layer_guidance_start: float = Field(0.01, ge=0, le=1)
    skip_layer_guidance_stop: float = Field(0.2, ge=0, le=1)

    def arguments(self) -> dict[str, Any]:
        """Arguments of :meth:`sd35_trt.runtime.PipelinePool.submit`, with a seed; pictures are
        apart.
        """
        size = None if self.size in (None, "auto") else self.size
        return {
            "prompt": self.prompt,
            "negative": self.negative_prompt or "",
            "seed": secrets.randbelow(_RANDOM_SEEDS) if self.seed is None else self.seed,
            "batch": self.n,
            "size": None if size is None else tuple(map(int, size.split("x"))),
            "steps": self.steps,
            "guidance": self.guidance,
            "shift": self.shift,
            "sampler": self.sampler,
            "adapters": self.adapters,
            "negative_2": self.negative_prompt_2,
            "negative_3": self.negative_prompt_3,
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
        }


class GenerationBody(Body):
    """``POST /v1/images/generations``."""


class EditBody(Body):
    """``POST /v1/images/edits``, as a form beside its picture: every value is text there."""

    model_config = ConfigDict(strict=False)

    control: Mapping[Text, FormControl] | None = Field(
        None, max_length=_MOST_ENTRIES, description="As of a generation, or with files."
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="How much is redrawn: 0.6 of a picture, 1 under a mask."
    )
    paste: bool = Field(False, description="Keep the picture's own pixels outside the mask.")

    def arguments(self, masked: bool = False) -> dict[str, Any]:
        """As of a generation.

        Args:
            masked: whether there is a mask.
        """
        usual = 1.0 if masked else 0.6
        strength = usual if self.strength is None else self.strength
        return {**super().arguments(), "strength": strength, "paste": self.paste}


#: The body's field by argument of the runtime, in the order in which they are blamed.
FIELDS = {
    # Before steps: of another number of steps, a strength may be enough.
    "strength": "strength",
    "steps": "steps",
    "guidance": "guidance",
    "shift": "shift",
    "sampler": "sampler",
    "batch": "n",
    "size": "size",
    "t5_tokens": "t5_tokens",
    "step_cache": "step_cache",
    "adapters": "adapters",
    "skip_guidance_layers": "skip_guidance_layers",
    "controls": FIELD,
    "negative": "negative_prompt",
    "negative_2": "negative_prompt_2",
    "negative_3": "negative_prompt_3",
    "prompt_2": "prompt_2",
    "prompt_3": "prompt_3",
    "prompt": "prompt",
    "weighting": "weighting",
    "seed": "seed",
    "paste": "paste",
    "mask": "mask",
    "image": "image",
}
