"""The world that mini draws: flat shapes on a flat background, and what may be said of them.

A :class:`Spec` is what a caption states, a :class:`Scene` one concrete picture. A spec lists
*allowed* values, so "a circle that is not red" is a circle with seven allowed colours.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = 128
"""Side of the default picture, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (248, 222, 45),
    "green": (45, 165, 70),
    "cyan": (60, 210, 225),
    "blue": (40, 85, 220),
    "purple": (130, 55, 180),
    "pink": (248, 135, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (130, 130, 130),
    "cream": (250, 234, 196),
    "navy": (18, 26, 78),
    "brown": (98, 62, 36),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
MOON = "moon"
"""A shape that mini does not know without a LoRA."""
DRAWN_SHAPES = (*SHAPES, MOON)
"""Every shape that there may be in a picture."""
SIZES: dict[str, tuple[float, float]] = {"small": (9.0, 11.0), "large": (15.5, 18.0)}
"""Nominal radius of an object in pixels, from and to."""
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says of one object: the allowed shapes, colours and sizes."""

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)


@dataclass(frozen=True)
class Spec:
    """What a caption says: exactly these objects, in these relations.

    A relation ``(i, name, j)`` reads "object i is <name> of object j". ``backgrounds`` are the
    allowed ones.
    """

    objects: tuple[ObjectSpec, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Thing:
    """One drawn object; centre and nominal radius in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One concrete picture."""

    background: str
    things: tuple[Thing, ...]
