"""The Stable Diffusion 3.5 model family, one row per model, and how to tell them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .components import LATENT_SCALE
from .errors import UsageError

#: The name of a variant of another structure.
CUSTOM = "custom"


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

    @property
    def structure(self) -> tuple[int, int, int]:
        """What a transformer's configuration tells it by: blocks, heads, dual attentions."""
        return self.num_layers, self.num_attention_heads, self.dual_attention_layers

    @property
    def described_structure(self) -> str:
        """The structure in words."""
        blocks, heads, dual = self.structure
        second = f", a second attention in {dual}" if dual else ""
        return f"{blocks} blocks of {heads} heads{second}"


# Steps and guidance: model cards of stabilityai/stable-diffusion-3.5-{large,large-turbo,medium}.
VARIANTS = (
    Variant("large", 38, 38, 0, steps=28, guidance=3.5, size=(1024, 1024)),
    Variant("large-turbo", 38, 38, 0, steps=4, guidance=1.0, size=(1024, 1024)),
    Variant("medium", 24, 24, 13, steps=40, guidance=4.5, size=(1024, 1024)),
    # The packaged checkpoint; its guidance is where it draws best (mini/README.md).
    Variant("mini", 6, 3, 0, steps=28, guidance=3.0, size=(128, 128)),
)


# Parts of a name: between separators, and of "largeTurbo" or "sd35turbo" both.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

_TELLING = frozenset({"large", "medium", "turbo"})


def telling_words(name: str) -> frozenset[str]:
    """What a name says of the variant: words among ``large``, ``medium`` and ``turbo``."""
    return _TELLING.intersection(word.lower() for word in _WORD.findall(name))


def recognise(config: Mapping[str, object], hint: str = "", wish: str | None = None) -> Variant:
    """Name the variant behind a transformer configuration.

    Args:
        config: ``transformer/config.json`` of a diffusers checkpoint.
        hint: the checkpoint's name. Large and Large-Turbo have the same structure, configurations
            and scheduler, so only the word ``turbo`` tells them apart.
        wish: the variant's name, where the user gives it; the hint is not asked then.

    Returns:
        A row of :data:`VARIANTS`, or a row named ``custom`` for any other size of SD3.5.

    Raises:
        UsageError: there is no such variant, or the structure is not its.
    """
    layers = int(config.get("num_layers", 18))  # type: ignore[call-overload]
    heads = int(config.get("num_attention_heads", 18))  # type: ignore[call-overload]
    dual = len(config.get("dual_attention_layers") or ())  # type: ignore[arg-type]
    turbo = wish is None and "turbo" in telling_words(hint)
    native = int(config.get("sample_size", 128)) * LATENT_SCALE  # type: ignore[call-overload]
    steps, guidance = (4, 1.0) if turbo else (28, 4.5)
    custom = Variant(CUSTOM, layers, heads, dual, steps, guidance, (native, native))
    alike = [variant for variant in VARIANTS if variant.structure == custom.structure]
    if wish is None:
        return next((v for v in alike if ("turbo" in telling_words(v.name)) == turbo), custom)
    possible = {variant.name: variant for variant in (*alike, custom)}
    if wish in possible:
        return possible[wish]
    fix = f"leave it out, or use: {', '.join(possible)}"
    row = next((variant for variant in VARIANTS if variant.name == wish), None)
    if row is None:
        raise UsageError(f"--model-variant {wish}: there is no such variant", fix)
    raise UsageError(
        f"--model-variant {wish} has {row.described_structure}, this model "
        f"{custom.described_structure}",
        fix,
    )
