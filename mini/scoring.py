"""How much of what captions state is in the pictures drawn for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .checker import ATTRIBUTES, Verdict, find, judge_detections
from .scenes import Example, sample

STEPS = 28


GUIDANCE = 3.0
"""The guidance at which held-out accuracy is best."""


@dataclass(frozen=True)
class Score:
    """Accuracies, 0..1. ``attributes`` and ``scenes`` (by kind of caption) give (share, count)."""

    attribute_accuracy: float
    whole_scene_accuracy: float
    attributes: dict[str, tuple[float, int]]
    scenes: dict[str, tuple[float, int]]
    chance_attribute_accuracy: float
    chance_whole_scene_accuracy: float
    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict:
        """The figures, ready for JSON."""
        return {
            "captions": len(self.verdicts),
            "whole_scene_accuracy": self.whole_scene_accuracy,
            "attribute_accuracy": self.attribute_accuracy,
            "chance_whole_scene_accuracy": self.chance_whole_scene_accuracy,
            "chance_attribute_accuracy": self.chance_attribute_accuracy,
            "attributes": {name: share for name, (share, _) in self.attributes.items()},
            "scenes": {name: share for name, (share, _) in self.scenes.items()},
        }


def heldout(number: int, first: int = 0) -> list[Example]:
    """Held-out examples ``first`` to ``first + number``."""
    return [sample(seed, "heldout") for seed in range(first, first + number)]


def _attribute_share(verdicts: Sequence[Verdict]) -> float:
    values = [holds for v in verdicts for row in v.statements.values() for holds in row]
    return sum(values) / max(len(values), 1)


def score(images: np.ndarray, examples: Sequence[Example]) -> Score:
    """Score pictures, uint8 [n, h, w, 3], of examples.

    Chance is what the same pictures score when each is judged by the next example's caption.
    Raises ValueError if the numbers differ.
    """
    if len(images) != len(examples):
        raise ValueError(f"{len(images)} images for {len(examples)} examples")
    detections = [find(image) for image in images]
    verdicts = [judge_detections(*f, e.spec) for f, e in zip(detections, examples, strict=True)]
    shuffled = [examples[(i + 1) % len(examples)] for i in range(len(examples))]
    chance = [judge_detections(*f, e.spec) for f, e in zip(detections, shuffled, strict=True)]
    attributes = {}
    for name in ATTRIBUTES:
        values = [holds for v in verdicts for holds in v.statements.get(name, ())]
        if values:
            attributes[name] = (sum(values) / len(values), len(values))
    scenes = {}
    for tag in sorted({tag for e in examples for tag in e.tags}):
        whole = [v.whole for v, e in zip(verdicts, examples, strict=True) if tag in e.tags]
        scenes[tag] = (sum(whole) / len(whole), len(whole))
    return Score(
        attribute_accuracy=_attribute_share(verdicts),
        whole_scene_accuracy=sum(v.whole for v in verdicts) / len(verdicts),
        attributes=attributes,
        scenes=scenes,
        chance_attribute_accuracy=_attribute_share(chance),
        chance_whole_scene_accuracy=sum(v.whole for v in chance) / len(chance),
        verdicts=tuple(verdicts),
    )
