"""How files of adapters spell their tensors: the layer that one belongs to, and what it is of it.

A name is a layer's and a role's. Layers are spelled as in diffusers and transformers, or as in the
original, with a prefix for the part; kohya's and LyCORIS' names have underscores for dots. Sources:
kohya's ``sd-scripts/networks/lora_sd3.py``, LyCORIS' ``wrapper.py``, PEFT's ``save_and_load.py``,
diffusers' ``lora_base.py``, ComfyUI's ``lora.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .original import LAYOUTS
from .tensor_shapes import tensor_shapes
from .text_names import CLIP_ANCHORS, T5_ANCHOR

if TYPE_CHECKING:
    import torch

#: In front of all names that PEFT saves.
PEFT = "base_model.model."

#: Parts that adapters are of.
PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

# The adapter's own name is between a role and ``weight`` in PEFT's memory, and in some files.
_OWN = r"(?:\.(?!weight|bias)\w+)?"
_ROLES = {
    "down": rf"\.lora_A{_OWN}\.weight|\.lora_down\.weight|\.lora\.down\.weight",
    "up": rf"\.lora_B{_OWN}\.weight|\.lora_up\.weight|\.lora\.up\.weight",
    "bias": rf"\.lora_B{_OWN}\.bias",
    "magnitude": rf"\.dora_scale|\.lora_magnitude_vector{_OWN}(?:\.weight)?",
    "alpha": r"\.alpha",
    **{f"hada_{x}": rf"\.hada_{x}{_OWN}" for x in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{
        f"lokr_{x}": rf"\.lokr_{x}{_OWN}"
        for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    },
}  # fmt: skip
_ROLE = re.compile("|".join(f"(?P<{role}>{pattern})$" for role, pattern in _ROLES.items()))

# Prefixes of names with dots, besides those of whole files, and of names with underscores.
_DOTTED = {"transformer": ("transformer.",)}
_UNDERSCORED = {
    "lora_unet_": "transformer",
    "lora_transformer_": "transformer",
    "lycoris_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}

# Names that a part's original layout is told by; several where there are several spellings.
_SPELLINGS = {
    "transformer": (("joint_blocks.{}.x_block.attn.qkv.weight",),),
    "text_encoder": ((CLIP_ANCHORS[0],), (CLIP_ANCHORS[1],)),
    "text_encoder_2": ((CLIP_ANCHORS[0],), (CLIP_ANCHORS[1],)),
    "text_encoder_3": ((T5_ANCHOR,),),
}


def split_name(name: str) -> tuple[str, str] | None:
    """The layer and the role of a tensor; None where it has none of the roles."""
    match = _ROLE.search(name)
    if match is None or match.lastgroup is None:
        return None
    return name[: match.start()], match.lastgroup


@dataclass(frozen=True)
class Target:
    """A layer of a part that a file's layer is, or is a part of.

    Attributes:
        part: its folder.
        module: its name in diffusers.
        take: from a tensor whose rows are the file's layer's outputs to the target's.
    """

    part: str
    module: str
    take: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class FileLayer:
    """A layer as files spell it.

    Attributes:
        shape: of its weight, [out, in, …].
        targets: one, or queries, keys and values.
    """

    shape: tuple[int, ...]
    targets: list[Target] = field(default_factory=list)


class LayerNames:
    """The layers of a model by the names that files of adapters give them.

    Args:
        shapes: of the weights of each part's layers, by their names in diffusers.
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        self._layers = {part: _layers(part, own) for part, own in shapes.items()}
        self._flat = {
            part: {name.replace(".", "_"): layer for name, layer in layers.items()}
            for part, layers in self._layers.items()
        }

    def find(self, key: str) -> FileLayer | None:
        """The layer of :func:`split_name`; None where the model has none of that name."""
        for prefix, part in _UNDERSCORED.items():
            if key.startswith(prefix):
                return self._flat.get(part, {}).get(key.removeprefix(prefix))
        key = key.removeprefix(PEFT)
        for part, layers in self._layers.items():
            for prefix in _prefixes(part):
                if key.startswith(prefix) and (layer := layers.get(key.removeprefix(prefix))):
                    return layer
        return None

    def absent_part(self, key: str) -> str | None:
        """The part that a layer's name says it is of, where the model was opened without."""
        plain = key.removeprefix(PEFT)
        for part in PARTS:
            own = (*_prefixes(part), *(p for p, of in _UNDERSCORED.items() if of == part))
            if part not in self._layers and plain.startswith(own):
                return part
        return None


def _prefixes(part: str) -> tuple[str, ...]:
    return (*_DOTTED.get(part, ()), *LAYOUTS[part].prefixes)


def layer_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a part's layers, but for norms."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensor_shapes(part, config).items()
        if name.endswith(".weight") and len(shape) > 1
    }


def _layers(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FileLayer]:
    """Layers by their names in diffusers, and in the part's original layout."""
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.", name))}
    layers: dict[str, FileLayer] = {}
    for module, shape in shapes.items():
        layers[module] = FileLayer(shape, [Target(part, module, lambda tensor: tensor)])
    for anchors in _SPELLINGS[part]:
        names = {a.format(i) for a in anchors for i in blocks or {0}}
        origins, spelled = LAYOUTS[part].origins(names), dict[str, FileLayer]()
        for module, shape in shapes.items():
            origin = origins(f"{module}.weight")
            own = origin.source.removesuffix(".weight")
            if own in layers:
                continue
            layer = spelled.setdefault(own, FileLayer(()))
            layer.targets.append(Target(part, module, origin.take))
            layer.shape = (shape[0] * len(layer.targets), *shape[1:])
        layers |= spelled
    return layers
