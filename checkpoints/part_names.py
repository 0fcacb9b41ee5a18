"""How files of a part are called: the published names, near ones, and a model's own.

Names are compared in lower case and without suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from .gguf import SUFFIX

#: Of files that a part may be in.
SUFFIXES = (".safetensors", SUFFIX)


@dataclass(frozen=True)
class _Naming:
    """How files of a part are called; names are in lower case, without suffix.

    Attributes:
        example: the published name.
        pattern: what a name holds.
        words: patterns of the words that published names consist of.
        own: what follows the model's name in a file that is named after it.
    """

    example: str
    pattern: str
    words: str
    own: str


# Between words: "eclipse_l" and "umt5xxl" are none.
_START, _END, _GAP = r"(?<![a-z0-9])", r"(?![a-z0-9])", r"[ _.-]?"
_PRECISION = r"fp32|f32|fp16|f16|bf16|fp8|e4m3fn|e4m3|e5m2|scaled|i?q\d|[01ksml]|xxs|xs|nl"
_CLIP_L, _CLIP_G = (rf"{_START}clip{_GAP}{letter}{_END}" for letter in "lg")
_T5 = rf"{_START}t5{_GAP}(v1{_GAP}1{_GAP})?xxl{_END}"
_VAE = rf"{_START}vae{_END}"
_T5_WORDS = r"t5|t5xxl|xxl|v1|google|enc|encoder|encoderonly|only"

_NAMINGS = {
    "text_encoder": _Naming("clip_l", _CLIP_L, rf"clip|clipl|{_PRECISION}", _CLIP_L),
    "text_encoder_2": _Naming("clip_g", _CLIP_G, rf"clip|clipg|g|{_PRECISION}", _CLIP_G),
    "text_encoder_3": _Naming("t5xxl_fp16", _T5, rf"{_T5_WORDS}|{_PRECISION}", _T5),
    # Not "ae": that is FLUX's autoencoder, which has the same shapes.
    "vae": _Naming(
        "sd3_vae",
        rf"(?=.*sd{_GAP}3)(?=.*{_VAE})",
        rf"sd|sd3|sd35|3|5|35|vae|large|medium|turbo|{_PRECISION}",
        _VAE,
    ),
}


def example_name(part: str) -> str:
    """The published name of a part's file, without suffix."""
    return _NAMINGS[part].example


def names_part(file: PurePath, part: str) -> bool:
    """Whether a file's name says that it is this part, beside other words: ``ft_clip_l``."""
    return bool(re.search(_NAMINGS[part].pattern, _name(file)))


def is_published(file: PurePath, part: str) -> bool:
    """Whether a file's name says so, and has no words besides those of published files."""
    return names_part(file, part) and _has_no_other_words(_name(file), part)


def names_after(model: PurePath, file: PurePath, part: str) -> bool:
    """Whether a file is a model's by its name: ``NAME_clip_l`` is that of ``NAME``."""
    rest = _name(file).removeprefix(_name(model))
    named = rest != _name(file) and rest[:1] in (" ", "_", ".", "-")
    return named and bool(re.search(_NAMINGS[part].own, rest)) and _has_no_other_words(rest, part)


def rank(file: PurePath) -> int:
    """Lower for a more precise file, by its name."""
    words = set(_words(_name(file)))
    if file.suffix.lower() == SUFFIX:
        return 6
    if words & {"fp8", "e4m3fn", "e4m3", "e5m2"}:
        return 4 if "scaled" in words else 5
    precisions = [{"fp32", "f32"}, {"fp16", "f16"}, {"bf16"}]
    return next((i for i, names in enumerate(precisions) if words & names), len(precisions))


def same_names(files: Iterable[PurePath]) -> bool:
    """Whether all files have one name, whatever their folders."""
    return len({_name(file) for file in files}) < 2


def _name(file: PurePath) -> str:
    return file.stem.lower()


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[ _.-]+", name) if word]


def _has_no_other_words(name: str, part: str) -> bool:
    return all(re.fullmatch(_NAMINGS[part].words, word) for word in _words(name))
