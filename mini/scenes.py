"""Examples of mini's world: a caption, what it states, and a scene that shows it.

Everything follows from a seed.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

from .captions import write_caption
from .placement import draw_scene
from .world import Scene, Spec

SPLITS = ("train", "heldout")
MAX_WORDS = 28
"""Longest caption in words and punctuation marks; fits 32 tokens with start and end."""

_HELDOUT_SHARE = 12  # one combination in so many is held out


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


def split_of(spec: Spec) -> str:
    """The split a combination belongs to, ``train`` or ``heldout``.

    It hashes what is asked of the objects and their relations, whatever the wording and the
    background: "small red star" is one combination, and so is "a red star above a blue ring".
    """
    key = repr((spec.objects, spec.relations)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % _HELDOUT_SHARE else "heldout"


def words(caption: str) -> int:
    """How many words and punctuation marks a caption has."""
    return len(re.findall(r"\w+|[^\w\s]", caption))


def sample(seed: int, split: str = "train") -> Example:
    """The example of a seed in a split, always the same one.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    while True:
        caption, spec, tags = write_caption(rng)
        if words(caption) <= MAX_WORDS and split_of(spec) == split:
            return Example(caption, spec, draw_scene(spec, rng), tags)
