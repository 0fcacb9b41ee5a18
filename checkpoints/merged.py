"""A model into which LoRAs are merged while it is read: one tensor at a time, in FP32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sd35_trt.errors import CheckpointError

from .adapter_file import AdapterFile
from .adapter_names import PARTS, LayerNames, layer_shapes
from .adapter_updates import Update
from .diffusers import Part
from .model_options import Lora
from .single_file import OpenedCheckpoint
from .weights import Weights

if TYPE_CHECKING:
    import torch


class MergedWeights(Weights):
    """The tensors of a part with what LoRAs do to them.

    A tensor that one of them changes is in FP32. Input scales that the part's file has were
    measured without: there are none.

    Args:
        base: the part's own.
        updates: tensor → what is done to it, in turn.
    """

    def __init__(self, base: Weights, updates: Mapping[str, Sequence[Update]]) -> None:
        self.folder = base.folder
        self.files = base.files
        self.quantization = base.quantization
        self.advice = base.advice
        self._base = base
        self._updates = updates

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        """See :meth:`Weights.shape`."""
        return self._base.shape(name)

    def dtype(self, name: str) -> str:
        """See :meth:`Weights.dtype`."""
        return "F32" if name in self._updates else self._base.dtype(name)

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`."""
        return self._base.unused(names)

    def source(self, name: str) -> str:
        """See :meth:`Weights.source`."""
        return self._base.source(name)

    def read(self, name: str) -> torch.Tensor:
        """See :meth:`Weights.read`."""
        stored = self._base.read(name)
        if name not in self._updates:
            return stored
        base = value = stored.float()
        for update in self._updates[name]:
            value = update.apply(value, base)
        return value

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`; None where a LoRA changes the tensor."""
        return None if name in self._updates else self._base.fp8(name)

    def _file(self, name: str) -> Path:
        return self._base._file(name)


@dataclass(frozen=True)
class MergedLora:
    """A LoRA in a model.

    Attributes:
        lora: as it was asked for.
        file: that it is in.
        files: that its result depends on.
        parts: part → layers of it that it changes.
    """

    lora: Lora
    file: Path
    files: tuple[Path, ...]
    parts: Mapping[str, int]

    def listed(self, number: int, file: Path | None = None) -> str:
        """How a file of it is listed among a part's: with its place among the LoRAs, and scale."""
        return f"lora-{number}/{(file or self.file).name}:{self.lora.factor}"


class MergedCheckpoint:
    """A model with LoRAs in its weights; its interface is that of :class:`Checkpoint`.

    Args:
        base: the model without.
        loras: merged in turn.

    Attributes:
        loras: what they change.

    Raises:
        CheckpointError: a file that cannot be read, or is of another model.
    """

    def __init__(self, base: OpenedCheckpoint, loras: Sequence[Lora]) -> None:
        self.base = base
        self.root = base.root
        self.given: dict[str, Part] = base.given
        shapes = {p: layer_shapes(p, base.config(p)) for p in PARTS if base.has(p)}
        names = LayerNames(shapes)
        self._updates: dict[str, dict[str, list[Update]]] = {}
        self.loras = tuple(self._merge(lora, names) for lora in loras)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself.
        return MergedCheckpoint, (self.base, [merged.lora for merged in self.loras])

    @property
    def hint(self) -> str:
        """See :meth:`Checkpoint.hint`."""
        return self.base.hint

    def has(self, part: str) -> bool:
        """See :meth:`Checkpoint.has`."""
        return self.base.has(part)

    def place(self, part: str) -> Path:
        """See :meth:`Checkpoint.place`."""
        return self.base.place(part)

    def class_name(self, part: str) -> str | None:
        """See :meth:`Checkpoint.class_name`."""
        return self.base.class_name(part)

    def config(self, part: str) -> dict[str, Any]:
        """See :meth:`Checkpoint.config`."""
        return self.base.config(part)

    def weights(self, part: str) -> Weights:
        """See :meth:`Checkpoint.weights`."""
        own = self.base.weights(part)
        return MergedWeights(own, self._updates[part]) if part in self._updates else own

    def tokenizer(self, folder: str) -> Path:
        """See :meth:`Checkpoint.tokenizer`."""
        return self.base.tokenizer(folder)

    def files(self, folder: str) -> list[Path]:
        """See :meth:`Checkpoint.files`; those of the LoRAs are :meth:`lora_files`."""
        return self.base.files(folder)

    def lora_files(self, folder: str) -> dict[str, Path]:
        """Files of the LoRAs that change a part, by a name with place and scale."""
        return {
            merged.listed(number, path): path
            for number, merged in enumerate(self.loras, 1)
            if folder in merged.parts
            for path in merged.files
        }

    def _merge(self, lora: Lora, names: LayerNames) -> MergedLora:
        file, parts = AdapterFile(lora.path), dict[str, set[str]]()
        weights = {part: self.base.weights(part) for part in PARTS if self.base.has(part)}
        for layer in file.layers(names):
            for part, name, update in file.updates(layer, lora.scale):
                if name not in weights[part]:
                    raise CheckpointError(
                        f"{file.path} adds to {name!r}, which the model does not have",
                        "take a LoRA that was trained on this model",
                    )
                self._updates.setdefault(part, {}).setdefault(name, []).append(update)
                parts.setdefault(part, set()).add(name.rpartition(".")[0])
        counts = {part: len(modules) for part, modules in parts.items()}
        return MergedLora(lora, file.path, tuple(file.files), counts)


#: A checkpoint of any layout.
AnyCheckpoint: TypeAlias = OpenedCheckpoint | MergedCheckpoint


def merge_loras(checkpoint: OpenedCheckpoint, loras: Sequence[Lora]) -> AnyCheckpoint:
    """The checkpoint with LoRAs merged into it: itself where there are none.

    Raises:
        CheckpointError: see :class:`MergedCheckpoint`.
    """
    return MergedCheckpoint(checkpoint, loras) if loras else checkpoint
