"""Placing objects so that what a spec says of them is plainly true."""

from __future__ import annotations

import random

import numpy as np

from .world import SIZE, SIZES, Scene, Spec, Thing

_GAP = 4.0  # between two objects, and from an object to the border, in pixels


def relation_holds(name: str, x: float, y: float, other_x: float, other_y: float) -> bool:
    """Whether the point (x, y) is clearly <name> of the other one, y pointing down.

    Clearly means nearer to the named axis than to the diagonal, and at least 8 pixels away.
    """
    dx, dy = x - other_x, y - other_y
    along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[name]
    across = dy if name in ("left", "right") else dx
    return along >= 8 and along > abs(across)


def _place(rng: random.Random, radii: list[float], spec: Spec) -> list[tuple[float, float]]:
    """Centres with distance between all objects and every relation plainly true."""
    draw = np.random.default_rng(rng.getrandbits(64))
    r = np.array(radii)
    low, high = r + _GAP, SIZE - r - _GAP
    while True:
        at = draw.random((512, len(r), 2)) * (high - low)[None, :, None] + low[None, :, None]
        good = np.ones(len(at), bool)
        for i in range(len(r)):
            for j in range(i):
                apart = np.hypot(*(at[:, i] - at[:, j]).T)
                good &= apart >= 1.12 * (r[i] + r[j]) + _GAP
        for i, name, j in spec.relations:
            axis = 0 if name in ("left", "right") else 1
            along = at[:, i, axis] - at[:, j, axis]
            along = along if name in ("right", "below") else -along
            across = np.abs(at[:, i, 1 - axis] - at[:, j, 1 - axis])
            good &= (along >= r[i] + r[j] + _GAP) & (across <= 0.6 * along)
        if good.any():
            return [(float(x), float(y)) for x, y in at[int(good.argmax())]]


def draw_scene(spec: Spec, rng: random.Random) -> Scene:
    """A random scene that satisfies the spec."""
    alike = len(set(spec.objects)) == 1 and len(spec.objects) > 1 and not spec.relations
    picks: list[tuple[str, str, str]] = []
    for index, o in enumerate(spec.objects):
        if alike and index:  # "three stars" are three equal stars
            picks.append(picks[0])
        else:
            picks.append((rng.choice(o.shapes), rng.choice(o.colours), rng.choice(o.sizes)))
    while True:
        radii = [rng.uniform(*SIZES[size]) for _, _, size in picks]
        if _fits(radii, spec):
            break
    places = _place(rng, radii, spec)
    things = (
        Thing(shape, colour, size, x, y, radius)
        for (shape, colour, size), (x, y), radius in zip(picks, places, radii, strict=True)
    )
    return Scene(rng.choice(spec.backgrounds), tuple(things))


def _fits(radii: list[float], spec: Spec) -> bool:
    """Whether three objects in one row leave the placement some slack."""
    axes = [name in ("left", "right") for _, name, _ in spec.relations]
    one_axis = len(radii) == 3 and len(axes) == 2 and axes[0] == axes[1]
    return not one_axis or 2 * sum(radii) + 4 * _GAP <= SIZE - 10
