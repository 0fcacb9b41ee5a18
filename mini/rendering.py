"""Rendering scenes: signed distances of the shapes, and anti-aliased pictures of them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .world import BACKGROUNDS, COLOURS, DRAWN_SHAPES, MOON, SIZE, Scene


def _star(points: int, inner: float) -> np.ndarray:
    angle = -np.pi / 2 + np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -(y + 2.5)], 1) / 15.5


def _cross(arm: float) -> np.ndarray:
    corner = [(arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
    return np.array(corner + [(-x, -y) for x, y in corner], float)


_POLYGONS: dict[str, np.ndarray] = {
    "square": 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float),
    "diamond": np.array([(0, -1.12), (0.8, 0), (0, 1.12), (-0.8, 0)]),
    "triangle": np.array([(0, -1.0), (1.08, 0.85), (-1.08, 0.85)]),
    "star": 1.14 * _star(5, 0.44),
    "heart": _heart(),
    "cross": _cross(0.34),
}


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of nominal radius 1 centred at the origin.

    ``x`` and ``y`` have one common shape; the result has it too and is negative inside. Polygons
    follow Inigo Quilez, https://iquilezles.org/articles/distfunctions2d/.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.98
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78) - 0.24
    if shape == MOON:
        return np.maximum(np.hypot(x, y) - 1.0, 0.75 - np.hypot(x - 0.5, y))
    polygon = _POLYGONS[shape]
    p = np.stack([x, y], -1)
    squared = np.full(x.shape, np.inf)
    sign = np.ones(x.shape)
    for a, b in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        edge, to_p = b - a, p - a
        along = np.clip((to_p @ edge) / (edge @ edge), 0, 1)
        squared = np.minimum(squared, ((to_p - along[..., None] * edge) ** 2).sum(-1))
        crosses = (p[..., 1] >= a[1]) != (p[..., 1] >= b[1])
        left = edge[0] * to_p[..., 1] - edge[1] * to_p[..., 0]
        sign = np.where(crosses & ((left > 0) == (edge[1] > 0)), -sign, sign)
    return sign * np.sqrt(squared)


@lru_cache(maxsize=4)
def distance_atlas(resolution: int = 129, extent: float = 1.6) -> np.ndarray:
    """Signed distances of every shape on a square grid, float32 [shapes, resolution, resolution].

    Row i and column j lie at ``y, x = linspace(-extent, extent, resolution)[[i, j]]``; distances
    are in nominal radii. Batched renderers sample it instead of evaluating the outlines.
    """
    axis = np.linspace(-extent, extent, resolution)
    x, y = np.meshgrid(axis, axis)
    return np.stack([shape_distance(shape, x, y) for shape in DRAWN_SHAPES]).astype(np.float32)


def render(scene: Scene, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Draw a scene, anti-aliased; uint8 [height, width, 3]."""
    image = np.empty((height, width, 3))
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        reach = 1.4 * thing.radius + 2
        left, right = (int(np.clip(thing.x + s, 0, width)) for s in (-reach, reach + 1))
        top, bottom = (int(np.clip(thing.y + s, 0, height)) for s in (-reach, reach + 1))
        x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
        distance = thing.radius * shape_distance(
            thing.shape, (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
        )
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        patch = image[top:bottom, left:right]
        patch[:] = (1 - cover) * patch + cover * np.array(COLOURS[thing.colour])
    return np.round(image).astype(np.uint8)
