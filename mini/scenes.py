"""The world that mini draws: flat shapes on a flat background, and captions for them.

An :class:`Example` is a caption, the :class:`Spec` it states (what any correct picture must show)
and one concrete :class:`Scene` that satisfies it. Everything follows from a seed. A spec lists
*allowed* values, so "a circle that is not red" is a circle with seven allowed colours.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

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
SIZES: dict[str, tuple[float, float]] = {"small": (9.0, 11.0), "large": (15.5, 18.0)}
"""Nominal radius of an object in pixels, from and to."""
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SPLITS = ("train", "heldout")
MAX_WORDS = 28
"""Longest caption in words and punctuation marks; fits 32 tokens with start and end."""

_GAP = 4.0  # between two objects, and from an object to the border, in pixels
_HELDOUT_SHARE = 12  # one combination in so many is held out


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


@dataclass(frozen=True)
class Example:
    """A caption, what it states, a scene that shows it, and what kind of caption it is.

    ``tags`` holds the layout (``single``, ``count``, ``pair``, ``trio``) and any of ``relation``,
    ``negation`` and ``nested`` (a relation between objects of which one carries a negation or a
    relation of its own).
    """

    caption: str
    spec: Spec
    scene: Scene
    tags: frozenset[str]


# --------------------------------------------------------------------------------- drawing


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
    return np.stack([shape_distance(shape, x, y) for shape in SHAPES]).astype(np.float32)


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


# ------------------------------------------------------------------------------- placement


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


# -------------------------------------------------------------------------------- captions

_SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big")}
_SHAPE_WORDS = {"cross": ("cross", "cross", "plus sign"), "diamond": ("diamond",)}
_RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of", "left of"),
    "right": ("right of", "to the right of", "on the right of", "right of"),
    "above": ("above", "over", "above", "on top of"),
    "below": ("below", "under", "beneath", "below"),
}
_NUMBERS = {2: "two", 3: "three"}


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _but(values: tuple[str, ...], *without: str) -> tuple[str, ...]:
    return tuple(v for v in values if v not in without)


@dataclass
class _Phrase:
    """One object in words: ``head`` without article, a trailing clause, and what they mean."""

    head: str
    clause: str
    spec: ObjectSpec
    negated: bool

    def text(self, article: str | None = None) -> str:
        return (f"{article} {self.head}" if article else _article(self.head)) + self.clause


def _shape_word(rng: random.Random, shape: str) -> str:
    return rng.choice(_SHAPE_WORDS.get(shape, (shape,)))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _phrase(
    rng: random.Random, negate: bool, *, plural: bool = False, full: bool = False
) -> _Phrase:
    """An object in words. ``full`` always names the colour; ``negate`` adds a negation."""
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    size = rng.choice(list(SIZES)) if rng.random() < 0.55 else None
    named = full or rng.random() < 0.85
    is_, one = ("are", "") if plural else ("is", "a ")
    that = rng.choice(("that", "that", "which"))
    nots = (f" {that} {is_} not", f" {that} {is_}n't", f" {that} {is_} not")
    noun = _shape_word(rng, shape)
    shapes: tuple[str, ...] = (shape,)
    colours: tuple[str, ...] = (colour,)
    clause = ""
    colour_word: str | None = colour
    size_word = rng.choice(_SIZE_WORDS[size]) if size else None

    kind = None
    if negate:
        kind = rng.choice(
            ("not-colour", "not-colour", "neither", "contrast", "contrast", "not-shape", "not-size")
        )
    if kind == "not-colour":
        colours, colour_word = _but(tuple(COLOURS), colour), None
        if rng.random() < 0.2:
            colour_word = f"non-{colour}"
        else:
            any_ = rng.choice(("color", "colour"))
            clause = rng.choice(
                (*(f"{n} {colour}" for n in nots), f" of any {any_} but {colour}",
                 f" in any {any_} except {colour}")
            )  # fmt: skip
    elif kind == "neither":
        other = rng.choice(_but(tuple(COLOURS), colour))
        colours, colour_word = _but(tuple(COLOURS), colour, other), None
        clause = f" {that} {is_} neither {colour} nor {other}"
    elif kind == "contrast":
        other = rng.choice(_but(tuple(COLOURS), colour))
        way = rng.randrange(4)
        if way == 0:
            colour_word = f"{colour}, not {other},"
        elif way == 1:
            colour_word, clause = None, f" {that} {is_} {colour}, not {other}"
        elif way == 2:
            colour_word, clause = None, f" {that} {is_} not {other} but {colour}"
        else:
            colour_word, clause = None, f" {that} {is_} {colour} instead of {other}"
    elif kind == "not-shape":
        shapes = _but(SHAPES, shape)
        not_noun = _plural(noun) if plural else noun
        noun = rng.choice(("shape", "object"))
        one = "" if plural else _article(not_noun)[: -len(not_noun)]
        clause = rng.choice(
            (*(f"{n} {one}{not_noun}" for n in nots), f" other than {one}{not_noun}")
        )
    elif kind == "not-size":
        away = rng.choice(list(SIZES))
        size = next(s for s in SIZES if s != away)
        size_word, clause = None, f"{rng.choice(nots)} {rng.choice(_SIZE_WORDS[away])}"
    if kind in (None, "not-size") and not named:
        colours, colour_word = tuple(COLOURS), None

    words = [w for w in (size_word, colour_word, _plural(noun) if plural else noun) if w]
    sizes = (size,) if size else tuple(SIZES)
    return _Phrase(" ".join(words), clause, ObjectSpec(shapes, colours, sizes), kind is not None)


def _relation_words(rng: random.Random, name: str, negate: bool) -> str:
    words = rng.choice(_RELATION_WORDS[name])
    if not negate:
        return words
    other = rng.choice(_but(RELATIONS, name))
    return f"not {rng.choice(_RELATION_WORDS[other])} but {words}"


def _background(rng: random.Random, negate: bool) -> tuple[str, tuple[str, ...]]:
    """Words for the background, to follow the caption, and the allowed backgrounds."""
    name = rng.choice(list(BACKGROUNDS))
    word = rng.choice(("gray", "grey")) if name == "gray" else name
    if negate:
        words = rng.choice((" on a background that is not {}", " on any background but {}"))
        return words.format(word), _but(tuple(BACKGROUNDS), name)
    words = rng.choice(
        (" on a {} background", " on {}", " against a {} background", ", {} background")
    )
    return words.format(word), (name,)


def _write(rng: random.Random) -> tuple[str, Spec, frozenset[str]]:
    """A random caption, its spec and its tags."""
    layout = rng.choices(("single", "count", "pair", "related", "trio"), (18, 16, 10, 40, 16))[0]
    negation = rng.choices(
        (None, "object", "relation", "background", "absence"), (55, 30, 6, 4, 5)
    )[0]
    on_object = negation == "object"
    relations: tuple[tuple[int, str, int], ...] = ()
    tags: set[str] = set()
    objects: tuple[ObjectSpec, ...]
    if layout == "single":
        phrase = _phrase(rng, on_object)
        text, objects = phrase.text(), (phrase.spec,)
        tags = {"single"}
    elif layout == "count":
        number = rng.choice(list(_NUMBERS))
        phrase = _phrase(rng, on_object, plural=True)
        text, objects = f"{_NUMBERS[number]} {phrase.head}{phrase.clause}", (phrase.spec,) * number
        tags = {"count"}
    elif layout == "pair":
        a, b = _phrase(rng, on_object, full=True), _phrase(rng, False, full=True)
        text, objects = f"{a.text()} and {b.text()}", (a.spec, b.spec)
        if rng.random() < 0.5:  # the negated object second: "and" would bind a clause to both
            text, objects = f"{b.text()} and {a.text()}", (b.spec, a.spec)
        tags = {"pair"}
    elif layout == "related":
        first = rng.random() < 0.5
        a = _phrase(rng, on_object and first)
        b = _phrase(rng, on_object and not first)
        name = rng.choice(RELATIONS)
        words = _relation_words(rng, name, negation == "relation")
        second = b.text("the" if rng.random() < 0.3 else None)
        way = rng.randrange(4)
        if way == 0:
            text = f"{words} {second} there is {a.text()}"
        elif way == 1:
            text = f"{words} {second}, {a.text()}"
        elif a.clause:
            text = f"{a.text()}, {words} {second}"
        else:
            text = f"{a.text()} {rng.choice(('', '', 'that is '))}{words} {second}"
        objects, relations = (a.spec, b.spec), ((0, name, 1),)
        tags = {"pair", "relation"} | ({"nested"} if on_object else set())
    else:
        negated = rng.randrange(3) if on_object and rng.random() < 0.6 else -1
        a, b, c = (_phrase(rng, i == negated, full=True) for i in range(3))
        name, other = rng.choice(RELATIONS), rng.choice(RELATIONS)
        words, more = (rng.choice(_RELATION_WORDS[n]) for n in (name, other))
        comma = "," if a.clause else ""
        way = rng.randrange(3)
        if way == 0:
            order = {"left": "from right to left", "right": "from left to right"}.get(
                name, "from top to bottom" if name == "below" else "from bottom to top"
            )
            text = f"{order}: {a.text()}, {b.text()} and {c.text()}"
            relations = ((1, name, 0), (2, name, 1))
        elif way == 1:
            text = f"{a.text()}{comma} {words} {b.text()} that is {more} {c.text()}"
            if b.clause:
                text = f"{a.text()}{comma} {words} {b.text()} and {more} {c.text()}"
            relations = ((0, name, 1), (1 if not b.clause else 0, other, 2))
        else:
            text = f"{a.text()}{comma} {words} {b.text()} and {more} {c.text()}"
            relations = ((0, name, 1), (0, other, 2))
        objects = (a.spec, b.spec, c.spec)
        tags = {"trio", "relation"} | ({"nested"} if way or negated >= 0 else set())
        if negated < 0 and on_object:
            negation = None

    backgrounds = tuple(BACKGROUNDS)
    if negation == "background" or rng.random() < 0.45:
        words, backgrounds = _background(rng, negation == "background")
        text += words
    if negation == "absence":
        named = {s for o in objects for s in o.shapes}
        missing = rng.choice([s for s in SHAPES if s not in named])
        noun = _shape_word(rng, missing)
        text += rng.choice((f", no {_plural(noun)}", f" but no {noun}", f", without any {noun}"))
    if negation == "relation" and layout != "related":
        negation = None
    if negation:
        tags.add("negation")
    if rng.random() < 0.2 and text.startswith(("a ", "an ", "two ", "three ")):
        text = rng.choice(("a picture of ", "an image of ", "a drawing of ", "draw ")) + text
    if rng.random() < 0.35:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return text, Spec(objects, relations, backgrounds), frozenset(tags)


# ---------------------------------------------------------------------------------- splits


def split_of(spec: Spec) -> str:
    """The split a combination belongs to, ``train`` or ``heldout``.

    It hashes what is asked of the objects and their relations, whatever the wording and the
    background: "small red star" is one combination, and so is "a red star above a blue ring".
    """
    key = repr((spec.objects, spec.relations)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % _HELDOUT_SHARE else "heldout"


def _words(caption: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", caption))


def sample(seed: int, split: str = "train") -> Example:
    """The example of a seed in a split, always the same one.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    while True:
        caption, spec, tags = _write(rng)
        if _words(caption) <= MAX_WORDS and split_of(spec) == split:
            return Example(caption, spec, draw_scene(spec, rng), tags)
