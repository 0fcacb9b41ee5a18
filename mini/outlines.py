"""Whether a picture follows the outlines of a scene: its shapes, in their sizes and places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .checker import Detection
from .world import Scene, Thing

_PLACE = 3.0  # farthest that a centre may be off, in pixels
_RADIUS = 0.15  # most that a radius may be off, of it


def _matches(found: Detection, thing: Thing) -> bool:
    near = np.hypot(found.x - thing.x, found.y - thing.y) <= _PLACE
    alike = abs(found.radius - thing.radius) <= _RADIUS * thing.radius
    return found.shape == thing.shape and bool(near) and alike


def followed(detections: Sequence[Detection], scene: Scene) -> tuple[bool, ...]:
    """Of each thing of a scene, whether its outline is among what was found."""
    return tuple(any(_matches(found, thing) for found in detections) for thing in scene.things)


def follows(detections: Sequence[Detection], scene: Scene) -> bool:
    """Whether what was found are the things of a scene, in outline, and no other."""
    return len(detections) == len(scene.things) and all(followed(detections, scene))
