"""What the text encoders read of an image: one text for all, or one each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sd35_trt.errors import UsageError

from .arguments import several
from .token_weights import weighted_parts


class Prompt(NamedTuple):
    """A prompt, or a negative one.

    Attributes:
        clip_l, clip_g, t5: text for each encoder.
        weighted: whether marks of weights are read, see :mod:`sd35_trt.runtime.token_weights`.
    """

    clip_l: str
    clip_g: str
    t5: str
    weighted: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is no text."""
        return not (self.clip_l or self.clip_g or self.t5)

    def text_of(self, encoder: str) -> str:
        """The text of a text encoder, by its component's name."""
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5": self.t5}[encoder]


#: A prompt without text.
NO_TEXT = Prompt("", "", "")


def make_prompts(
    name: str, texts: Sequence[Any], check: Callable[[str, Any], str], weighted: bool
) -> list[Prompt]:
    """Prompts from an argument and those that differ from it for CLIP-G and for T5.

    Args:
        name: of the argument; the others end in ``_2`` and ``_3``.
        texts: the three: a text, or a list of texts; None of the latter two takes the first. A text
            stands for all entries of another's list.
        check: of one text.
        weighted: whether marks of weights are read.

    Raises:
        UsageError: an argument of another kind, or lists of different lengths.
    """
    first, *others = texts
    names = [name, *(f"{name}_{number}" for number in range(2, len(texts) + 1))]
    values = [first, *(first if other is None else other for other in others)]
    columns = [_texts(own, value, check) for own, value in zip(names, values, strict=True)]
    count = next((len(c) for c, v in zip(columns, values, strict=True) if _is_list(v)), 1)
    for own, value, column in zip(names, values, columns, strict=True):
        if not _is_list(value):
            column *= count
        elif len(column) != count:
            raise UsageError(
                f"{own} has {len(column)} texts, another of {', '.join(names)} has {count}",
                "give one text, or lists of one length",
            )
    rows = zip(*columns, strict=True)
    prompts = [Prompt(clip_l, clip_g, t5, weighted) for clip_l, clip_g, t5 in rows]
    if weighted:
        for prompt in prompts:
            for text in dict.fromkeys(prompt[:3]):
                weighted_parts(text)  # refused now, not where others are drawn in the same run
    return prompts


def parameters_of_prompts(name: str, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """The arguments that gave some prompts; see :func:`make_prompts`."""
    parameters = {name: [prompt.clip_l for prompt in prompts]}
    for number, column in (2, "clip_g"), (3, "t5"):
        texts = [prompt.text_of(column) for prompt in prompts]
        if texts != parameters[name]:
            parameters[f"{name}_{number}"] = texts
    return parameters


def _is_list(value: Any) -> bool:
    return not isinstance(value, str)


def _texts(name: str, value: Any, check: Callable[[str, Any], str]) -> list[str]:
    if isinstance(value, str):
        return [check(name, value)]
    return several(name, value, check, "text, or a list of texts")
