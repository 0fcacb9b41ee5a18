"""Says whether a picture shows what its caption states, attribute by attribute.

``python -m sd35_trt.mini.checker`` validates it on true and on altered scenes.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import click
import numpy as np

from .placement import draw_scene, relation_holds
from .rendering import render, shape_distance
from .scenes import sample
from .world import (
    BACKGROUNDS,
    COLOURS,
    DRAWN_SHAPES,
    OPPOSITE,
    SHAPES,
    SIZES,
    ObjectSpec,
    Scene,
    Spec,
)

ATTRIBUTES = ("shape", "colour", "size", "count", "relation", "background")

_CONTRAST = 14.0  # least CIELAB distance of an object from the background
_FAR = 32.0  # a colour farther than this from every named one has no name
_LEAST_AREA = 24.0  # pixels; smaller specks are noise, the smallest object has about 110
_LEAST_OVERLAP = 0.72  # of an object and the outline it is taken for
_SIZE_LIMIT = (SIZES["small"][1] + SIZES["large"][0]) / 2
_MOST_OBJECTS = 6  # more are counted, but not assigned


def scikit_image() -> Any:
    """The library, which the scenes themselves do without.

    Raises:
        click.ClickException: it is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise click.ClickException(
            f"checking scenes needs scikit-image ({error}): pip install 'sd35-trt[build,report]'"
        ) from error
    return skimage


@dataclass(frozen=True)
class Detection:
    """An object in a picture. A shape or colour that resembles no known one is None.

    ``x`` and ``y`` are the centre and ``radius`` the nominal radius, in pixels.
    """

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Verdict:
    """Per attribute, whether each statement of the caption holds; unstated ones have no entry."""

    statements: dict[str, tuple[bool, ...]]

    @property
    def whole(self) -> bool:
        """Whether every statement holds."""
        return all(all(values) for values in self.statements.values())


def _lab(rgb: np.ndarray) -> np.ndarray:
    return scikit_image().color.rgb2lab(np.asarray(rgb, float) / 255)


def _nearest(lab: np.ndarray, named: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    names = list(named)
    distance = np.linalg.norm(_lab(np.array(list(named.values())))[...] - lab, axis=-1)
    best = int(distance.argmin())
    return names[best] if distance[best] <= limit else None


@lru_cache(maxsize=1)
def _moments() -> dict[str, tuple[float, float, float]]:
    """Per shape of radius 1: its area, and how far its centroid lies right of and below its
    centre."""
    axis = np.linspace(-1.5, 1.5, 601)
    x, y = np.meshgrid(axis, axis)
    moments = {}
    for shape in DRAWN_SHAPES:
        inside = shape_distance(shape, x, y) < 0
        area = float(inside.sum() * (axis[1] - axis[0]) ** 2)
        moments[shape] = area, float(x[inside].mean()), float(y[inside].mean())
    return moments


def _identify(cover: np.ndarray, left: int, top: int) -> tuple[str | None, float, float, float]:
    """Shape, centre and radius of one object from its coverage, whose corner is (left, top)."""
    y, x = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    area = cover.sum()
    cx, cy = float((cover * x).sum() / area), float((cover * y).sum() / area)
    best: tuple[float, str, float, float, float] = (-1.0, "", 0.0, 0.0, 0.0)
    for shape, (unit_area, right, below) in _moments().items():
        radius = float(np.sqrt(area / unit_area))
        at_x, at_y = cx - right * radius, cy - below * radius
        distance = radius * shape_distance(shape, (x - at_x) / radius, (y - at_y) / radius)
        ideal = np.clip(0.5 - distance, 0, 1)
        overlap = float(np.minimum(ideal, cover).sum() / np.maximum(ideal, cover).sum())
        best = max(best, (overlap, shape, radius, at_x, at_y))
    overlap, shape, radius, at_x, at_y = best
    return (shape if overlap >= _LEAST_OVERLAP else None), left + at_x, top + at_y, radius


def find(image: np.ndarray) -> tuple[str | None, list[Detection]]:
    """The background's name and the objects of a picture, the largest first.

    ``image`` is uint8 [height, width, 3]. Raises ValueError for anything else.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 [height, width, 3] image, got {image.dtype} {image.shape}"
        )
    pixels = image.astype(float)
    smooth = scikit_image().filters.gaussian(pixels, 0.8, channel_axis=2, preserve_range=True)
    ground = np.median(smooth.reshape(-1, 3), 0)
    contrast = np.linalg.norm(_lab(smooth) - _lab(ground), axis=2)
    labels = scikit_image().measure.label(contrast > _CONTRAST, connectivity=2)
    objects: list[tuple[float, Detection]] = []
    for region in scikit_image().measure.regionprops(labels, intensity_image=contrast):
        if region.area < _LEAST_AREA:
            continue
        inner = contrast[labels == region.label]
        core = np.median(smooth[labels == region.label][inner >= 0.75 * np.quantile(inner, 0.9)], 0)
        top, left, bottom, right = region.bbox
        top, left = max(top - 2, 0), max(left - 2, 0)
        window = slice(top, bottom + 2), slice(left, right + 2)
        # The picture is a blend of the two colours, so a pixel's share of the object's colour is
        # the share of the pixel that the object covers.
        step = core - ground
        cover = np.clip((pixels[window] - ground) @ step / (step @ step), 0, 1)
        near = (
            scikit_image().filters.gaussian((labels[window] == region.label).astype(float), 1.0)
            > 0.05
        )
        cover = np.where(near, cover, 0)
        if cover.sum() < _LEAST_AREA:
            continue
        shape, x, y, radius = _identify(cover, left, top)
        size = "small" if radius < _SIZE_LIMIT else "large"
        colour = _nearest(_lab(core), COLOURS, _FAR)
        objects.append((float(cover.sum()), Detection(shape, colour, size, x, y, radius)))
    objects.sort(key=lambda pair: -pair[0])
    return _nearest(_lab(ground), BACKGROUNDS, _FAR), [detection for _, detection in objects]


def judge_detections(background: str | None, detections: list[Detection], spec: Spec) -> Verdict:
    """Judge the objects of a picture. They are assigned to the spec's so that most holds."""
    slots = len(spec.objects)
    padded: list[Detection | None] = [*detections[:_MOST_OBJECTS]]
    padded += [None] * (slots - len(padded))
    best: dict[str, tuple[bool, ...]] = {}
    for choice in permutations(padded, slots):
        truths = _truths(choice, spec)
        if not best or sum(map(sum, truths.values())) > sum(map(sum, best.values())):
            best = truths
    best["count"] = (len(detections) == slots,)
    if len(spec.backgrounds) < len(BACKGROUNDS):
        best["background"] = (background in spec.backgrounds,)
    return Verdict({name: best[name] for name in ATTRIBUTES if best.get(name)})


def _truths(choice: tuple[Detection | None, ...], spec: Spec) -> dict[str, tuple[bool, ...]]:
    pairs = list(zip(choice, spec.objects, strict=True))
    truths = {
        "shape": tuple(
            f is not None and f.shape in o.shapes for f, o in pairs if len(o.shapes) < len(SHAPES)
        ),
        "colour": tuple(
            f is not None and f.colour in o.colours
            for f, o in pairs
            if len(o.colours) < len(COLOURS)
        ),
        "size": tuple(
            f is not None and f.size in o.sizes for f, o in pairs if len(o.sizes) < len(SIZES)
        ),
    }
    relations = []
    for i, name, j in spec.relations:
        a, b = choice[i], choice[j]
        holds = a is not None and b is not None and relation_holds(name, a.x, a.y, b.x, b.y)
        relations.append(holds)
    truths["relation"] = tuple(relations)
    return truths


def judge(image: np.ndarray, spec: Spec) -> Verdict:
    """Judge a uint8 [height, width, 3] picture by a spec."""
    return judge_detections(*find(image), spec)


# ------------------------------------------------------------------------------ validation


def altered(spec: Spec, attribute: str, rng: random.Random) -> Scene | None:
    """A scene in which one statement of the spec is false, the other ones true.

    None if the spec states nothing of that attribute. Raises ValueError for an unknown attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}; choose one of {', '.join(ATTRIBUTES)}")
    others = list(_altered_specs(spec, attribute))
    for _ in range(20):  # "a star left of a star" reads the same the other way round
        if not others:
            return None
        scene = draw_scene(rng.choice(others), rng)
        detections = [
            Detection(t.shape, t.colour, t.size, t.x, t.y, t.radius) for t in scene.things
        ]
        if not judge_detections(scene.background, detections, spec).whole:
            return scene
    return None


def _altered_specs(spec: Spec, attribute: str) -> Iterator[Spec]:
    objects = spec.objects
    if attribute == "background":
        rest = tuple(b for b in BACKGROUNDS if b not in spec.backgrounds)
        if rest:
            yield replace(spec, backgrounds=rest)
    elif attribute == "count":
        if len(objects) < 3:
            yield replace(spec, objects=(*objects, objects[-1]))
        if len(objects) > 1 and not spec.relations:
            yield replace(spec, objects=objects[:-1])
    elif attribute == "relation":
        for index, (i, name, j) in enumerate(spec.relations):
            turned = list(spec.relations)
            turned[index] = (i, OPPOSITE[name], j)
            yield replace(spec, relations=tuple(turned))
    else:
        field = {"shape": "shapes", "colour": "colours", "size": "sizes"}[attribute]
        every = getattr(ObjectSpec(), field)
        for index, o in enumerate(objects):
            rest = tuple(value for value in every if value not in getattr(o, field))
            if rest:
                changed = list(objects)
                changed[index] = replace(o, **{field: rest})
                yield replace(spec, objects=tuple(changed))


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a small VAE leaves of a picture, and a little worse: blur, noise and a colour cast."""
    blurred = scikit_image().filters.gaussian(
        image.astype(float), 0.8, channel_axis=2, preserve_range=True
    )
    noisy = blurred + rng.normal(0, 6, image.shape) + rng.normal(0, 4, 3)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def validate(scenes: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Share of scenes that pass, for true and for altered ones, clean and degraded."""
    noise = np.random.default_rng(seed)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "clean": lambda image: image,
        "degraded": lambda image: degrade(image, noise),
    }
    passes: dict[str, Counter[str]] = {way: Counter() for way in ways}
    total: Counter[str] = Counter()
    for index in range(scenes):
        example = sample(seed * scenes + index, "heldout")
        rng = random.Random(index)
        pictures: dict[str, Scene | None] = {"true": example.scene}
        pictures |= {name: altered(example.spec, name, rng) for name in ATTRIBUTES}
        for kind, scene in pictures.items():
            if scene is None:
                continue
            total[kind] += 1
            image = render(scene)
            for way, change in ways.items():
                passes[way][kind] += judge(change(image), example.spec).whole
    return {way: {kind: passes[way][kind] / total[kind] for kind in total} for way in ways}


@click.command()
@click.option("--scenes", default=500, show_default=True, help="Scenes to judge.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(scenes: int, as_json: bool) -> None:
    """Share of pictures that the checker passes: true ones, and with one attribute altered."""
    shares = validate(scenes)
    if as_json:
        click.echo(json.dumps(shares))
        return
    for way, row in shares.items():
        click.echo(f"{way:9}" + "".join(f"  {k} {v:7.2%}" for k, v in row.items()))


if __name__ == "__main__":
    main()
