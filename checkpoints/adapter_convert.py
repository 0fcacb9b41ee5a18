"""From a LoRA as it was published to an adapter that a bundle takes as inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sd35_trt.errors import CheckpointError
from sd35_trt.formats.adapter import (
    Adapter,
    AdapterLayer,
    adapter_slots,
    check_fits,
    check_takes_adapters,
)
from sd35_trt.formats.bundle import Bundle, sha256_file
from sd35_trt.formats.contract import check_contract

from .adapter_file import AdaptedLayer, AdapterFile
from .adapter_names import PARTS, LayerNames
from .adapter_updates import LowRank

if TYPE_CHECKING:
    import torch

_MERGE = "merge it into the weights: sd35-trt build --lora FILE:SCALE"


def convert_adapter(path: Path, bundle: Bundle) -> Adapter:
    """A LoRA in the form that bundles of one structure take.

    Args:
        path: the file, a folder that PEFT or diffusers saved it in, or ``mini:NAME``.
        bundle: one of that structure.

    Raises:
        CheckpointError: the file cannot be read, is of another model, or has what cannot be an
            input: a DoRA, LoHa or LoKr, a bias, or a layer that takes no adapters.
        BundleError: a bundle that cannot be drawn from.
        UsageError: a bundle that takes none, or none of this rank.
    """
    check_contract(bundle.manifest, bundle.root)
    check_takes_adapters(bundle)
    slots = adapter_slots(bundle.manifest)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in PARTS[:-1]}
    for name, slot in slots.items():
        part, _, layer = name.partition("/")
        shapes[part][layer] = slot.shape[::-1]
    file = AdapterFile(path)
    layers: dict[str, AdapterLayer] = {}
    for adapted in _layers(file, LayerNames(shapes)):
        layers |= _matrices(file, adapted)
    adapter = Adapter(layers, sha256_file(file.path))
    check_fits(adapter, bundle.manifest, str(path))
    return adapter


def _layers(file: AdapterFile, names: LayerNames) -> list[AdaptedLayer]:
    """The file's layers, of which each can be an input.

    Raises:
        CheckpointError: names the tensor that cannot.
    """
    for key, roles in file.roles.items():
        first = min(roles.values())
        if roles.keys() - {"down", "up", "alpha"}:
            odd = next(n for r, n in sorted(roles.items()) if r not in ("down", "up", "alpha"))
            raise CheckpointError(
                f"{file.path}: {odd!r} is of no LoRA whose matrices alone are inputs", _MERGE
            )
        if names.find(key) is None:
            raise CheckpointError(
                f"{file.path}: {first!r} is of a layer that takes no adapters as inputs", _MERGE
            )
    return file.layers(names)


def _matrices(file: AdapterFile, adapted: AdaptedLayer) -> dict[str, AdapterLayer]:
    """The matrices of the model's layers that a file's layer is; its scaling is in ``up``."""
    if adapted.kind is not LowRank:
        raise CheckpointError(f"{file.path} is a {adapted.kind.title}", _MERGE)
    tensors = file.layer_tensors(adapted)
    up: torch.Tensor = tensors["up"] * adapted.scaling
    down = tensors["down"].numpy()
    result = {}
    for target in adapted.layer.targets:
        own = np.ascontiguousarray(target.take(up).numpy())
        if not np.isfinite(own).all():
            name = adapted.names["up"]
            raise CheckpointError(
                f"{file.path}: {name!r} times its alpha is not finite", "take another file"
            )
        result[f"{target.part}/{target.module}"] = AdapterLayer(down, own)
    return result
