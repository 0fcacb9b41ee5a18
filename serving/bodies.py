"""What a request for pictures may say: OpenAI's fields, and ours beside them.

A field that would not be followed is refused: no client is left to think that it was.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sd35_trt.runtime.request import MAX_STEPS
from sd35_trt.runtime.schedule import SAMPLERS

_LARGEST_SEED = 2**64 - 1

# Of a seed that nobody gave: any client's numbers hold it.
_RANDOM_SEEDS = 2**32

#: As many as there can be steps to show.
MOST_PARTIAL_IMAGES = 100


def _without_surrogates(value: Any) -> Any:
    """Halves of surrogate pairs become U+FFFD, as in the runtime; JSON can escape them."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, BeforeValidator(_without_surrogates)]


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
    seed: int | None = Field(
        None, ge=0, le=_LARGEST_SEED, description="Of the first picture; the next count up."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=100)
    shift: float | None = Field(None, ge=0.01, le=100)
    sampler: Text | None = Field(None, json_schema_extra={"examples": list(SAMPLERS)})

    def arguments(self) -> dict[str, Any]:
        """Arguments of :meth:`sd35_trt.runtime.PipelinePool.submit`, with a seed."""
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
        }


class GenerationBody(Body):
    """``POST /v1/images/generations``."""


class EditBody(Body):
    """``POST /v1/images/edits``, as a form beside its picture: every value is text there."""

    model_config = ConfigDict(strict=False)

    strength: float = Field(0.6, ge=0, le=1, description="How much of the picture is redrawn.")

    def arguments(self) -> dict[str, Any]:
        """As of a generation; the picture is apart."""
        return {**super().arguments(), "strength": self.strength}


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
    "negative": "negative_prompt",
    "prompt": "prompt",
    "seed": "seed",
    "image": "image",
}
