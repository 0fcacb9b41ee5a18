"""Bundles that can be opened and not drawn from: signed again after a change of the manifest.

Each attack changes the manifest of a whole bundle; all end in one line when a pipeline is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Attack = Callable[[dict[str, Any]], object]

#: Attack → words of the refusal.
ATTACKS: dict[Attack, str] = {}


def _attack(words: str) -> Callable[[Attack], Attack]:
    def register(attack: Attack) -> Attack:
        ATTACKS[attack] = words
        return attack

    return register


def _component(data: dict[str, Any], name: str) -> Any:
    return next(c for c in data["components"] if c["name"] == name)


@_attack("has no clip_l")
def nothing_to_draw_with(data: dict[str, Any]) -> None:
    """No components. Those that a picture takes are asked for."""
    data["components"] = []


@_attack("has two components t5")
def twice(data: dict[str, Any]) -> None:
    """Two text encoders of one name. Names are of one component each."""
    data["components"].append(_component(data, "t5"))


@_attack("conditioner has no output modulation")
def a_port_less(data: dict[str, Any]) -> None:
    """A conditioner without modulation. Ports are asked for by their names."""
    del _component(data, "conditioner")["outputs"][1]


@_attack("denoiser has an input key, which is unknown")
def a_port_more(data: dict[str, Any]) -> None:
    """A denoiser with an input that nobody feeds. It is refused, as it could not run."""
    inputs = _component(data, "denoiser")["inputs"]
    inputs.append({"name": "key", "dtype": "float32", "shape": [1]})


@_attack("input sigma of denoiser is int64, not float32")
def numbers_of_another_kind(data: dict[str, Any]) -> None:
    """Noise levels as integers, which an engine would read as tiny numbers. Types are compared."""
    _component(data, "denoiser")["inputs"][1]["dtype"] = "int64"


@_attack(r"output hidden of clip_l is \['seconds'")
def a_dimension_of_ones_own(data: dict[str, Any]) -> None:
    """A dimension that no request has. The names of dimensions are known."""
    _component(data, "clip_l")["outputs"][0]["shape"][0] = "seconds"


@_attack("output modulation of conditioner is")
def memory_without_end(data: dict[str, Any]) -> None:
    """Modulation of two billion rows. No width is above a million."""
    _component(data, "conditioner")["outputs"][1]["shape"][2] = 2**31 - 1


@_attack("input context of denoiser is")
def parts_that_do_not_fit(data: dict[str, Any]) -> None:
    """A context of another width than the conditioner's. A name's number is the same everywhere."""
    _component(data, "denoiser")["inputs"][4]["shape"][2] += 1


@_attack("bounds of batch of vae_decoder are 4 to 0")
def bounds_upside_down(data: dict[str, Any]) -> None:
    """No picture at most, by which memory would be divided. Bounds are in order, and from 1."""
    _component(data, "vae_decoder")["bounds"]["batch"] = [4, 0]


@_attack("conditioner takes prompt_embeds of")
def texts_too_wide(data: dict[str, Any]) -> None:
    """CLIP wider than what the conditioner reads. Both are put beside each other before T5."""
    for port in (
        _component(data, "t5")["outputs"][0],
        _component(data, "conditioner")["inputs"][0],
    ):
        port["shape"][2] = 1


@_attack("has no tokenizer of clip_g")
def no_tokenizer(data: dict[str, Any]) -> None:
    """A text encoder without a tokenizer. Each has its own."""
    del data["tokenizers"]["clip_g"]


@_attack("tokenizer of clip_l pads to 4611686018427387904")
def tokens_without_end(data: dict[str, Any]) -> None:
    """Texts of 2**62 tokens. No text is longer than a million."""
    data["tokenizers"]["clip_l"]["length"] = 1 << 62


@_attack("tokenizer of clip_g pads to 3")
def tokens_too_few(data: dict[str, Any]) -> None:
    """A text cut to other lengths than its encoder reads. They are compared."""
    data["tokenizers"]["clip_g"]["length"] = 3


@_attack("runs no quantum engines")
def builder_of_another_world(data: dict[str, Any]) -> None:
    """A builder that is unknown. It is said which are known."""
    data["builder"] = "quantum"
