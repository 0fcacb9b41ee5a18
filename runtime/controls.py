"""ControlNets of a request: which, with what pictures, how much, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.compat.opencv import canny_edges
from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import ControlRecord, Manifest

from .arguments import flag, number, shown
from .source_pictures import pixels_of

if TYPE_CHECKING:
    from .source_pictures import PictureLike

_LARGEST_SCALE = 100.0

#: The kind of ControlNet that takes edges.
_EDGES = "canny"


@dataclass(frozen=True)
class Control:
    """What a ControlNet is asked for.

    Attributes:
        image: that is followed: uint8 [H, W, 3] in RGB, PIL's, or the path of a file; of the
            pictures that the net was trained on, such as edges.
        scale: how much, -100 to 100.
        start, end: of the steps, the share after which it begins, and at which it ends.
        edges: whether the image is any picture, whose edges are taken.
    """

    image: PictureLike
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    edges: bool = False


@dataclass(frozen=True)
class ControlUse:
    """A ControlNet in a run.

    Attributes:
        name: the net's.
        pictures: uint8 [B, H, W, 3].
        scales: of each image, none 0 as :func:`control_uses` returns it.
        start, end: see :class:`Control`.
    """

    name: str
    pictures: np.ndarray
    scales: tuple[float, ...]
    start: float
    end: float

    @property
    def key(self) -> tuple[str, float, float]:
        """What runs must agree in to be joined."""
        return self.name, self.start, self.end

    def counts(self, step: int, steps: int) -> bool:
        """Whether the net runs in a step; as diffusers' StableDiffusion3ControlNetPipeline."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)

    def parameters(self) -> dict[str, float]:
        """What was asked for, of the first image, besides the picture."""
        return {"scale": self.scales[0], "start": self.start, "end": self.end}


def control_uses(
    manifest: Manifest, value: Any, size: tuple[int, int], count: int
) -> tuple[ControlUse, ...]:
    """The ControlNets of a request, in the bundle's order, from the argument ``controls``.

    Args:
        value: None, or name → :class:`Control`, or the picture alone.
        size: (width, height) that pictures are resized to.
        count: images of the request; all follow the same pictures.

    Raises:
        UsageError: names what is wrong with it.
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise UsageError(f"controls must be a mapping from names to pictures, not {shown(value)}")
    known = {control.name: control for control in manifest.controls}
    for name in value:
        if name not in known:
            raise UsageError(f"there is no ControlNet {shown(name)}", _advice(known))
    asked = ((known[name], value[name]) for name in known if name in value)
    uses = (_use(record, control, size, count) for record, control in asked)
    return tuple(use for use in uses if any(use.scales))


def _advice(known: Mapping[str, ControlRecord]) -> str:
    if not known:
        return "build the bundle with: --controlnet NAME=DIR"
    return f"this bundle has: {', '.join(known)}"


def _use(record: ControlRecord, value: Any, size: tuple[int, int], count: int) -> ControlUse:
    control = value if isinstance(value, Control) else Control(value)
    name = f"controls[{record.name!r}]"
    scale = number(f"scale of {name}", control.scale, -_LARGEST_SCALE, _LARGEST_SCALE)
    start = number(f"start of {name}", control.start, 0, 1)
    end = number(f"end of {name}", control.end, 0, 1)
    if start >= end:
        raise UsageError(
            f"{name} starts at {start:g} and ends at {end:g}", "let it start before it ends"
        )
    pixels = pixels_of(name, control.image, size)
    if flag(f"edges of {name}", control.edges):
        if record.kind != _EDGES:
            raise UsageError(
                f"the ControlNet {record.name} takes no edges: it is of the kind {record.kind}",
                "give the picture that it takes",
            )
        pixels = canny_edges(pixels)
    return ControlUse(
        record.name, np.repeat(pixels[None], count, axis=0), (scale,) * count, start, end
    )


def join_controls(requests: Sequence[tuple[ControlUse, ...]]) -> tuple[ControlUse, ...]:
    """Those of several requests whose keys are the same, for all their images."""
    return tuple(
        replace(
            uses[0],
            pictures=np.concatenate([use.pictures for use in uses]),
            scales=tuple(scale for use in uses for scale in use.scales),
        )
        for uses in zip(*requests, strict=True)
    )
