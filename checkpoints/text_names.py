"""How files spell the tensors of the text encoders: transformers' names → the files'.

CLIP comes in three spellings: transformers' own; the same without ``text_model.``; and that of
OpenAI and open_clip, with a fused projection of queries, keys and values. T5's embedding has two
names, of which a file needs one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from .origin import Origin, Origins, third

if TYPE_CHECKING:
    import torch

_EMBEDDING = "embeddings.token_embedding.weight"

#: A tensor that every CLIP has, by spelling: transformers', without ``text_model.``, open_clip's.
CLIP_ANCHORS = (f"text_model.{_EMBEDDING}", _EMBEDDING, "token_embedding.weight")

#: A tensor that every T5 has.
T5_ANCHOR = "encoder.block.0.layer.0.SelfAttention.q.weight"

_PROJECTION = "text_projection.weight"

# open_clip has a parameter, whose product is the other way round.
_OPEN_PROJECTION = "text_projection"

_OPEN_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t()


def clip_origins(names: Collection[str]) -> Origins:
    """Origins of a CLIP's tensors.

    Args:
        names: in the file, without prefix.
    """
    plain, flat, opened = (anchor in names for anchor in CLIP_ANCHORS)
    turned = _OPEN_PROJECTION in names and _PROJECTION not in names

    def find(name: str) -> Origin:
        if name == _PROJECTION:
            return Origin(_OPEN_PROJECTION, _transposed) if turned else Origin(name)
        if plain or not (flat or opened):
            return Origin(name)
        return Origin(name.removeprefix("text_model.")) if flat else _open_origin(name)

    return find


def _open_origin(name: str) -> Origin:
    if name in _OPEN_OUTER:
        return Origin(_OPEN_OUTER[name])
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Origin(name)
    number, module, parameter = layer.groups()
    block = f"transformer.resblocks.{number}"
    fused = re.fullmatch(r"self_attn\.([qkv])_proj", module)
    if fused:
        return Origin(f"{block}.attn.in_proj_{parameter}", third("qkv".index(fused[1])))
    return Origin(f"{block}.{_OPEN_BLOCK.get(module, module)}.{parameter}")


def clip_l_origins(names: Collection[str]) -> Origins:
    """As :func:`clip_origins`, of a file with SD3.5's CLIP-L.

    SD3.5 uses CLIP-L's pooled state as it is: the original's loaders leave out a projection that
    the file may have, and transformers' class has the identity there.
    """
    rest = clip_origins(names)
    embedding = rest(CLIP_ANCHORS[0]).source

    def find(name: str) -> Origin:
        if name == _PROJECTION:
            return Origin(embedding, lambda t: t.new_ones(t.shape[1]).diag(), scaled=False)
        return rest(name)

    return find


def t5_origins(names: Collection[str]) -> Origins:
    """Origins of T5's tensors.

    Args:
        names: in the file, without prefix.
    """
    tied = ("shared.weight", "encoder.embed_tokens.weight")
    source = next((name for name in tied if name in names), tied[0])
    return lambda name: Origin(source if name in tied else name)
