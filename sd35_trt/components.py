"""The components of the ONNX contract and where in a checkpoint each comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ComponentRow:
    """One component.

    Attributes:
        name: as in the bundle.
        part: folder of its weights in the diffusers layout.
        tokenizer: folder of its tokenizer, for a text encoder.
    """

    name: str
    part: str
    tokenizer: str | None = None


COMPONENTS = {
    row.name: row
    for row in (
        ComponentRow("clip_l", "text_encoder", "tokenizer"),
        ComponentRow("clip_g", "text_encoder_2", "tokenizer_2"),
        ComponentRow("t5", "text_encoder_3", "tokenizer_3"),
        ComponentRow("conditioner", "transformer"),
        ComponentRow("denoiser", "transformer"),
        ComponentRow("vae_decoder", "vae"),
        ComponentRow("vae_encoder", "vae"),
    )
}

#: Image pixels per latent pixel, in each direction: the autoencoder halves the size three times.
LATENT_SCALE = 8

#: Parts that a checkpoint may lack: SD3.5 draws without T5, its text features then being zero.
OPTIONAL_PARTS = ("text_encoder_3",)
