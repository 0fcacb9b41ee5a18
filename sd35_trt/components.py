"""The components of the ONNX contract and where in a checkpoint each comes from."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass


@dataclass(frozen=True)
class ComponentRow:
    """One component.

    Attributes:
        name: as in the bundle.
        part: folder of its weights in the diffusers layout.
        tokenizer: folder of its tokenizer, for a text encoder.
        layers: globs over the part's module names that say which of them are its own.
    """

    name: str
    part: str
    tokenizer: str | None = None
    layers: tuple[str, ...] = ("*",)

    def owns(self, layer: str) -> bool:
        """Whether a layer of the part belongs to this component."""
        return any(fnmatch.fnmatchcase(layer, glob) for glob in self.layers)


# What depends on the prompt and the timestep alone: embedders and adaLN linears.
_CONDITIONING = (
    "time_text_embed.*",
    "context_embedder",
    "*norm1.linear",
    "*norm1_context.linear",
    "norm_out.linear",
)
_STEP = ("pos_embed*", "*attn*", "*.ff*", "proj_out")


COMPONENTS = {
    row.name: row
    for row in (
        ComponentRow("clip_l", "text_encoder", "tokenizer"),
        ComponentRow("clip_g", "text_encoder_2", "tokenizer_2"),
        ComponentRow("t5", "text_encoder_3", "tokenizer_3", layers=("encoder.*",)),
        ComponentRow("conditioner", "transformer", layers=_CONDITIONING),
        ComponentRow("denoiser", "transformer", layers=_STEP),
        ComponentRow("vae_decoder", "vae", layers=("decoder*", "post_quant_conv")),
        ComponentRow("vae_encoder", "vae", layers=("encoder*", "quant_conv")),
    )
}


def layer_owner(part: str, layer: str) -> str | None:
    """The component that has a layer of a checkpoint's part as its own; None where none does.

    Args:
        part: the part's folder in the checkpoint.
        layer: name of a module that has parameters of its own.
    """
    for row in COMPONENTS.values():
        if row.part == part and row.owns(layer):
            return row.name
    return None


def module_owner(part: str, module: str) -> str | None:
    """The component that computes a module of a checkpoint's part; None where none does.

    A module that is not a layer of its own (a block, an adaptive norm) belongs to the part's last
    component unless all of it is another's.
    """
    owner = layer_owner(part, module) or layer_owner(part, f"{module}.")
    names = [row.name for row in COMPONENTS.values() if row.part == part]
    return owner or (names[-1] if len(names) > 1 else None)


#: Components whose linears take adapters as inputs, where a bundle has them.
ADAPTED = ("clip_l", "clip_g", "conditioner", "denoiser")

#: Image pixels per latent pixel, in each direction: the autoencoder halves the size three times.
LATENT_SCALE = 8

#: Parts that a checkpoint may lack: SD3.5 draws without T5, its text features then being zero.
OPTIONAL_PARTS = ("text_encoder_3",)

#: What users are told of a model that lacks it.
NO_T5 = "no T5: prompts are read by CLIP alone"

#: Components that are compiled: the step. All else runs once per picture, operator by operator.
COMPILED = ("denoiser",)
