"""Captions in English, with the spec that each states."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, ObjectSpec, Spec

_SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big")}
SHAPE_WORDS = {"cross": ("cross", "cross", "plus sign"), "diamond": ("diamond",)}
"""Words for shapes that have others than their name."""
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
    return rng.choice(SHAPE_WORDS.get(shape, (shape,)))


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


def write_caption(rng: random.Random) -> tuple[str, Spec, frozenset[str]]:
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
        absent = rng.choice([s for s in SHAPES if s not in named])
        noun = _shape_word(rng, absent)
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
