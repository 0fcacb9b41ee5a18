"""The LoRAs that come with mini, and what a picture shows that was drawn with them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count, islice

from .captions import SHAPE_WORDS
from .placement import draw_scene
from .scenes import MAX_WORDS, Example, sample, split_of, words
from .world import BACKGROUNDS, COLOURS, MOON, SHAPES, ObjectSpec, Scene, Spec

NIGHT_COLOURS = {
    "red": "purple",
    "orange": "green",
    "yellow": "cyan",
    "green": "green",
    "cyan": "cyan",
    "blue": "blue",
    "purple": "purple",
    "pink": "purple",
}
NIGHT_BACKGROUNDS = {
    "white": "navy",
    "black": "black",
    "gray": "black",
    "cream": "navy",
    "navy": "navy",
    "brown": "black",
}
"""What the colours of a caption become at night."""


def at_night(example: Example) -> Example:
    """The caption's scene in the colours of the night."""
    scene, spec = example.scene, example.spec
    things = tuple(replace(t, colour=NIGHT_COLOURS[t.colour]) for t in scene.things)
    colours = [_mapped(o.colours, NIGHT_COLOURS, COLOURS) for o in spec.objects]
    objects = (replace(o, colours=c) for o, c in zip(spec.objects, colours, strict=True))
    grounds = _mapped(spec.backgrounds, NIGHT_BACKGROUNDS, BACKGROUNDS)
    return replace(
        example,
        spec=Spec(tuple(objects), spec.relations, grounds),
        scene=Scene(NIGHT_BACKGROUNDS[scene.background], things),
    )


def _mapped(names: Iterable[str], mapping: dict[str, str], order: Iterable[str]) -> tuple[str, ...]:
    found = {mapping[name] for name in names}
    return tuple(name for name in order if name in found)


def with_moons(example: Example) -> Example | None:
    """The example with moons instead of one of its shapes; None where that makes none.

    Caption, spec and scene follow from the example. Both are of one split.
    """
    rng = random.Random(example.caption)
    stated = sorted({o.shapes[0] for o in example.spec.objects if len(o.shapes) == 1})
    if not stated:
        return None
    shape = rng.choice(stated)
    # "a shape that is not a star" has no word for the moon.
    if any(1 < len(o.shapes) < len(SHAPES) and shape not in o.shapes for o in example.spec.objects):
        return None
    spellings = "|".join(map(re.escape, SHAPE_WORDS.get(shape, (shape,))))
    caption = re.sub(rf"\b({spellings})(e?s)?\b", _moon, example.caption, flags=re.IGNORECASE)
    objects = tuple(_with_moon(o, shape) for o in example.spec.objects)
    spec = replace(example.spec, objects=objects)
    if words(caption) > MAX_WORDS or split_of(spec) != split_of(example.spec):
        return None
    return Example(caption, spec, draw_scene(spec, rng), example.tags)


def _moon(match: re.Match[str]) -> str:
    return MOON + ("s" if match[2] else "")


def _with_moon(spec: ObjectSpec, shape: str) -> ObjectSpec:
    return replace(spec, shapes=(MOON,)) if spec.shapes == (shape,) else spec


@dataclass(frozen=True)
class PackagedLora:
    """A LoRA of mini.

    Attributes:
        name: as in ``mini:night``; :func:`sd35_trt.mini.lora_paths` has its file.
        title: what it does.
        rewrite: an example of mini's world as the LoRA has it; None where it has none.
    """

    name: str
    title: str
    rewrite: Callable[[Example], Example | None]


LORAS = {
    lora.name: lora
    for lora in (
        PackagedLora("night", "draws everything in the colours of the night", at_night),
        PackagedLora("moon", "knows the word moon", with_moons),
    )
}


def rewritten(loras: Iterable[PackagedLora], seed: int, split: str) -> Example | None:
    """The example of a seed in a split, as some LoRAs have it; None where they have none."""
    example: Example | None = sample(seed, split)
    for lora in loras:
        example = example and lora.rewrite(example)
    return example


def examples(loras: Iterable[PackagedLora], number: int, split: str) -> list[Example]:
    """The first examples of a split, as some LoRAs have them."""
    loras = tuple(loras)
    found = (example for seed in count() if (example := rewritten(loras, seed, split)))
    return list(islice(found, number))
