"""Which model of the family a structure and a name stand for."""

from __future__ import annotations

from typing import Any

import pytest

from sd35_trt.errors import UsageError
from sd35_trt.variants import VARIANTS, Variant, recognise, telling_words


def config(variant: Variant) -> dict[str, Any]:
    return {
        "num_layers": variant.num_layers,
        "num_attention_heads": variant.num_attention_heads,
        "dual_attention_layers": list(range(variant.dual_attention_layers)),
        "sample_size": 128,
    }


LARGE, TURBO, MEDIUM, MINI = (config(variant) for variant in VARIANTS)
OTHER = {**LARGE, "num_layers": 30}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd3.5_large_turbo.safetensors", {"large", "turbo"}),
        ("stable-diffusion-3.5-large-turbo", {"large", "turbo"}),
        ("stableDiffusion35_largeTurbo.safetensors", {"large", "turbo"}),
        ("stable-diffusion-3.5-large-TurboX", {"large", "turbo"}),
        ("SD3.5 Large TURBO (fp8)", {"large", "turbo"}),
        ("SDTurbo", {"turbo"}),
        ("sd35turbo", {"turbo"}),
        ("turbolence", set()),
        ("Turbolence", set()),
        ("myturbo", set()),
        ("turbocharged-large", {"large"}),
        ("enlarged-medium", {"medium"}),
        ("b940f670f0eda2d07fbb75229e779da1ad11eb80", set()),
        ("", set()),
    ],
)
def test_words_of_names(name: str, words: set[str]) -> None:
    assert telling_words(name) == words


@pytest.mark.parametrize(
    ("structure", "hint", "name", "steps", "guidance"),
    [
        (LARGE, "", "large", 28, 3.5),
        (LARGE, "turbolence", "large", 28, 3.5),
        (LARGE, "my-turbo", "large-turbo", 4, 1.0),
        (MEDIUM, "sd3.5_large", "medium", 40, 4.5),
        (MEDIUM, "sd3.5-medium-turbo", "custom", 4, 1.0),
        (MINI, "", "mini", 28, 3.0),
        (OTHER, "sd3.5_large", "custom", 28, 4.5),
        (OTHER, "pruned-turbo", "custom", 4, 1.0),
    ],
)
def test_structure_and_name(
    structure: dict[str, Any], hint: str, name: str, steps: int, guidance: float
) -> None:
    variant = recognise(structure, hint)
    assert (variant.name, variant.steps, variant.guidance) == (name, steps, guidance)


@pytest.mark.parametrize(
    ("structure", "wish", "steps"),
    [(LARGE, "large", 28), (LARGE, "large-turbo", 4), (LARGE, "custom", 28),
     (MEDIUM, "medium", 40), (MINI, "mini", 28), (OTHER, "custom", 28)],
)  # fmt: skip
@pytest.mark.parametrize("hint", ["sd3.5_large_turbo", "sd3.5_large"])
def test_a_wish_overrides_the_name(
    structure: dict[str, Any], wish: str, steps: int, hint: str
) -> None:
    variant = recognise(structure, hint, wish)
    assert (variant.name, variant.steps) == (wish, steps)


@pytest.mark.parametrize(
    ("structure", "wish", "words"),
    [
        (LARGE, "medium", "medium has 24 blocks of 24 heads, a second attention in 13, this model "
         "38 blocks of 38 heads — leave it out, or use: large, large-turbo, custom"),
        (MEDIUM, "large-turbo", "large-turbo has 38 blocks of 38 heads, this model 24 blocks"),
        (OTHER, "large", "this model 30 blocks of 38 heads — leave it out, or use: custom"),
        (LARGE, "xl", "xl: there is no such variant — leave it out, or use: large, large-turbo"),
        (LARGE, "", ": there is no such variant"),
    ],
)  # fmt: skip
def test_a_wish_that_the_structure_contradicts(
    structure: dict[str, Any], wish: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        recognise(structure, "", wish)
    assert f"--model-variant {wish}" in str(caught.value)
    assert words in str(caught.value)
