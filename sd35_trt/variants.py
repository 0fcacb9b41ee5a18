"""The Stable Diffusion 3.5 model family, one row per model, and how to tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .components import LATENT_SCALE


@dataclass(frozen=True)
class Variant:
    """One model of the family.

    Attributes:
        name: as in ``bundle.json``.
        num_layers: MMDiT blocks.
        num_attention_heads: heads of 64 channels; the width is 64 times this.
        dual_attention_layers: number of leading blocks with a second, image-only attention.
        steps: default number of denoising steps (model card).
        guidance: default classifier-free guidance scale; 1.0 means the model needs none.
        size: default width and height in pixels.
    """

    name: str
    num_layers: int
    num_attention_heads: int
    dual_attention_layers: int
    steps: int
    guidance: float
    size: tuple[int, int]


# Steps and guidance: model cards of stabilityai/stable-diffusion-3.5-{large,large-turbo,medium}.
VARIANTS = (
    Variant("large", 38, 38, 0, steps=28, guidance=3.5, size=(1024, 1024)),
    Variant("large-turbo", 38, 38, 0, steps=4, guidance=1.0, size=(1024, 1024)),
    Variant("medium", 24, 24, 13, steps=40, guidance=4.5, size=(1024, 1024)),
    # The packaged checkpoint; its guidance is where it draws best (mini/README.md).
    Variant("mini", 6, 3, 0, steps=28, guidance=3.0, size=(128, 128)),
)


def recognise(config: Mapping[str, object], hint: str = "") -> Variant:
    """Name the variant behind a transformer configuration.

    Args:
        config: ``transformer/config.json`` of a diffusers checkpoint.
        hint: where the checkpoint came from. Large and Large-Turbo have the same structure, so
            only the name ("turbo") tells them apart.

    Returns:
        A row of :data:`VARIANTS`, or a row named ``custom`` for any other size of SD3.5.
    """
    layers = int(config.get("num_layers", 18))  # type: ignore[call-overload]
    heads = int(config.get("num_attention_heads", 18))  # type: ignore[call-overload]
    dual = len(config.get("dual_attention_layers") or ())  # type: ignore[arg-type]
    turbo = "turbo" in hint.lower()
    for variant in VARIANTS:
        structure = (variant.num_layers, variant.num_attention_heads, variant.dual_attention_layers)
        if structure == (layers, heads, dual) and ("turbo" in variant.name) == turbo:
            return variant
    native = int(config.get("sample_size", 128)) * LATENT_SCALE  # type: ignore[call-overload]
    steps, guidance = (4, 1.0) if turbo else (28, 4.5)
    return Variant("custom", layers, heads, dual, steps, guidance, (native, native))
