"""An adapter: a LoRA in the form that a bundle takes as inputs.

A safetensors file. ``<part>/<layer>.down`` [rank, in] and ``<part>/<layer>.up`` [out, rank], both
FP32 and finite, for each linear that it changes, by the names of the checkpoint in diffusers' and
transformers' spelling; what the update is scaled by besides the user's scale is in ``up``. The
header's metadata has ``format``, and ``source``: the SHA-256 of the file that it was made from.
docs/adapters.md specifies it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sd35_trt.components import component_row, layer_holder
from sd35_trt.errors import UsageError

from .bundle import AdapterGroup, Bundle, Manifest

#: Version of the format.
FORMAT = "sd35-trt-adapter-1"

#: Parts that adapters may change.
PARTS = ("transformer", "text_encoder", "text_encoder_2")

_NAME = re.compile(rf"({'|'.join(PARTS)})/([\w.]+)\.(down|up)")
_CONVERT = "convert the LoRA: sd35-trt adapter convert FILE --for BUNDLE --out FILE"

# A file of more is none of low rank.
_LARGEST = 8 << 30


@dataclass(frozen=True)
class AdapterLayer:
    """What is added to one linear: ``up @ down`` times the user's scale, FP32.

    Attributes:
        down: [rank, in].
        up: [out, rank].
    """

    down: np.ndarray
    up: np.ndarray

    @property
    def rank(self) -> int:
        """Of the matrices."""
        return int(self.down.shape[0])


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA in memory.

    Attributes:
        layers: ``<part>/<layer>`` → what is added to it.
        source: SHA-256 of the file that it was made from, in hex.
    """

    layers: Mapping[str, AdapterLayer]
    source: str

    @property
    def rank(self) -> int:
        """The largest of its layers'."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Of its matrices."""
        return sum(layer.down.nbytes + layer.up.nbytes for layer in self.layers.values())

    def parts(self) -> dict[str, int]:
        """Part → how many of its linears it changes."""
        names = [name.partition("/")[0] for name in self.layers]
        return {part: names.count(part) for part in PARTS if part in names}


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write an adapter.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors[f"{name}.down"] = np.ascontiguousarray(layer.down, np.float32)
        tensors[f"{name}.up"] = np.ascontiguousarray(layer.up, np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step, so that half a file is none.
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, work, {"format": FORMAT, "source": adapter.source})
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def lora_advice(name: str) -> str | None:
    """What to do where a LoRA of mini was given for an adapter; None for any other name."""
    return _CONVERT.replace("FILE", name, 1) if name.startswith("mini:") else None


def read_adapter(path: Path) -> Adapter:
    """Read an adapter, all of it into memory.

    Raises:
        UsageError: missing, damaged, not in this form, or not finite.
    """
    if not path.is_file():
        fix = lora_advice(str(path)) or "give the path of a file"
        raise UsageError(f"the adapter {path} is missing", fix)
    if path.stat().st_size > _LARGEST:
        raise UsageError(f"the adapter {path} is larger than 8 GiB", "take another")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            own = metadata.get("format") == FORMAT
            tensors = {n: file.get_tensor(n) for n in file.keys()} if own else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UsageError(f"the adapter {path} cannot be read: {error}", _CONVERT) from error
    if not own:
        raise UsageError(f"{path} is no adapter of sd35-trt", _CONVERT)
    return Adapter(_layers(path, tensors), metadata.get("source", ""))


def _layers(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, AdapterLayer]:
    """The layers of a file's tensors.

    Raises:
        UsageError: names the tensor that is not as the format says.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.ndim != 2 or tensor.dtype != np.float32 or not tensor.size:
            raise UsageError(f"{path}: {name!r} is no matrix of an adapter", _CONVERT)
        if not np.isfinite(tensor).all():
            raise UsageError(f"{path}: {name!r} holds NaN or infinite values", _CONVERT)
        pairs.setdefault(f"{match[1]}/{match[2]}", {})[match[3]] = tensor
    layers = {}
    for name, pair in pairs.items():
        if len(pair) != 2 or pair["down"].shape[0] != pair["up"].shape[1]:
            raise UsageError(f"{path}: the matrices of {name!r} do not fit each other", _CONVERT)
        layers[name] = AdapterLayer(pair["down"], pair["up"])
    if not layers:
        raise UsageError(f"{path} holds no adapter", _CONVERT)
    return layers


@dataclass(frozen=True)
class Slot:
    """Where a bundle takes the adapters of a linear.

    Attributes:
        component: the bundle's.
        group: the component's.
        block, linear: the linear's place in the group's inputs.
        shape: [in, out].
    """

    component: str
    group: AdapterGroup
    block: int
    linear: int
    shape: tuple[int, int]


def adapter_slots(manifest: Manifest) -> dict[str, Slot]:
    """The linears that a bundle takes adapters of: ``<part>/<layer>`` → where."""
    slots = {}
    for component in manifest.components:
        if layer_holder(component.name) != component.name:
            continue  # it is given the other's
        for group in component.adapters:
            rows, columns = component.input(group.down).shape[1], component.input(group.up).shape[3]
            shape = int(rows), int(columns)
            part = component_row(component.name).part
            for block, layers in enumerate(group.layers):
                for linear, layer in enumerate(layers):
                    slot = Slot(component.name, group, block, linear, shape)
                    slots[f"{part}/{layer}"] = slot
    return slots


def check_takes_adapters(bundle: Bundle) -> None:
    """Refuse a bundle that takes no adapters.

    Raises:
        UsageError: says how it is built.
    """
    if not bundle.manifest.adapter_ranks:
        raise UsageError(
            f"{bundle.root} takes no adapters", "build it with: sd35-trt build --adapters RANK"
        )


def check_fits(adapter: Adapter, manifest: Manifest, name: str) -> None:
    """Refuse an adapter of another structure, or of a larger rank than the bundle takes.

    Args:
        name: of the adapter, for the message.

    Raises:
        UsageError: names the layer.
    """
    slots, most = adapter_slots(manifest), manifest.adapter_ranks[-1]
    for layer, matrices in adapter.layers.items():
        slot = slots.get(layer)
        shape = matrices.down.shape[1], matrices.up.shape[0]
        if slot is None or slot.shape != shape:
            what = f"takes none of {layer!r}" if slot is None else f"has {list(slot.shape)} there"
            raise UsageError(
                f"the adapter {name} changes {layer!r} from {shape[0]} to {shape[1]} features, "
                f"the bundle {what}",
                "take an adapter that was converted for this model",
            )
    if adapter.rank > most:
        raise UsageError(
            f"the adapter {name} is of rank {adapter.rank}, the bundle takes {most} together",
            f"build it with: --adapters {adapter.rank}",
        )
