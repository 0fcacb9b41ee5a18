"""The tensors of one part of a model, one at a time, by diffusers' and transformers' names."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd35_trt.errors import CheckpointError

from .file_formats import AGAIN
from .gguf import GgufFile
from .origin import Origin, Origins
from .tensor_files import TensorFiles
from .tensor_values import TensorValues
from .text_names import clip_origins, t5_origins
from .weight_files import weight_files
from .wrappers import check_plain, common_prefix

if TYPE_CHECKING:
    import torch


class Weights(abc.ABC):
    """The tensors of one model part by the names that diffusers and transformers give them.

    Tensors come as views of the mapped file, so nothing is held in memory that the caller does
    not keep.

    Attributes:
        folder: where they are, for messages.
        files: the files that they are in.
        quantization: how many tensors of the file have which type, where it is a GGUF file.
    """

    folder: Path
    files: list[Path]
    quantization: str | None = None

    #: What to do where a tensor is not what the configuration asks for.
    advice = "use the config.json that belongs to these weights"

    @abc.abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""

    @abc.abstractmethod
    def dtype(self, name: str) -> str:
        """Type of a tensor's values as safetensors, or ggml, spells it; F32 of a quantized one."""

    @abc.abstractmethod
    def unused(self, names: Iterable[str]) -> list[str]:
        """What is stored for the part besides some tensors and the scales of quantized ones, by
        the names in the file, sorted.
        """

    @abc.abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """A tensor in a floating-point type, as stored where it is not quantized.

        Raises:
            CheckpointError: names the tensor that is not there.
        """

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An E4M3 tensor as stored and its FP32 scale []; None where it is not stored in E4M3.

        The tensor's value is their product.
        """
        return None

    def source(self, name: str) -> str:
        """The tensor's own name in its file."""
        return name

    def input_amax(self, layer: str) -> float | None:
        """The largest input magnitude by the layer's input scale; None where it has none."""
        return None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what the configuration asks for.

        Raises:
            CheckpointError: names the first tensor that is missing or of another shape.
        """
        missing = [name for name in shapes if name not in self]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            source = self.source(missing[0])
            raise CheckpointError(f"{self.folder} has no tensor {source!r}{more}", AGAIN)
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"{self._file(name)}: {name!r} has shape {list(self.shape(name))}, "
                    f"the configuration asks for {list(shape)}",
                    self.advice,
                )

    @abc.abstractmethod
    def _file(self, name: str) -> Path:
        """The file that a tensor is in."""


class PartWeights(Weights):
    """A part's tensors by their diffusers names, each made when it is read.

    Args:
        tensors: what they are in.
        files: that these are in.
        prefix: in front of the part's names there.
        origins: makes the origins of diffusers' names from the names there, without prefix.
        others: prefixes of the other parts in the file, where all else is the part's; None where
            only what has the prefix is.
        advice: see :class:`Weights`; None keeps it.

    Raises:
        CheckpointError: a quantization that is not read here.
    """

    def __init__(
        self,
        tensors: TensorValues | GgufFile,
        files: Sequence[Path],
        prefix: str,
        origins: Callable[[Collection[str]], Origins],
        others: Collection[str] | None = None,
        advice: str | None = None,
    ) -> None:
        self.folder = tensors.path
        self.files = list(files)
        self.quantization = tensors.quantization
        self.advice = advice or self.advice
        self._in = tensors
        self._prefix = prefix
        tensors.check(prefix)
        names = {name.removeprefix(prefix) for name in tensors.names if name.startswith(prefix)}
        self._origin = origins(names)
        if others is None:
            self._own = {prefix + name for name in names}
        else:
            self._own = {name for name in tensors.names if not name.startswith(tuple(others))}

    def __contains__(self, name: str) -> bool:
        return self.source(name) in self._in

    def source(self, name: str) -> str:
        """See :meth:`Weights.source`."""
        return self._prefix + self._origin(name).source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a diffusers tensor, from the header.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        return self._origin(name).shape(self._in.shape(self._stored_name(name)))

    def dtype(self, name: str) -> str:
        """See :meth:`Weights.dtype`."""
        return self._in.dtype(self._stored_name(name))

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`."""
        return sorted(self._own - {self.source(name) for name in names})

    def read(self, name: str) -> torch.Tensor:
        """A diffusers tensor: a view of the file where it can be, FP32 where it was quantized.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        return self._origin(name).take(self._in.values(self._stored_name(name)))

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`. A fused projection has one scale for queries, keys, values."""
        origin = self._origin(name)
        pair = self._in.fp8(self._stored_name(name)) if origin.scaled else None
        return None if pair is None else (origin.take(pair[0]), pair[1])

    def input_amax(self, layer: str) -> float | None:
        """See :meth:`Weights.input_amax`."""
        return self._in.input_amax(self.source(f"{layer}.weight"))

    def _stored_name(self, name: str) -> str:
        source = self.source(name)
        if source not in self._in:
            raise CheckpointError(f"{self.folder} has no tensor {source!r}", AGAIN)
        return source

    def _file(self, name: str) -> Path:
        return self._in.file(self._stored_name(name))


# Part → how the names of its files are read; of others, they are diffusers' own.
_SPELLINGS: Mapping[str, Callable[[Collection[str]], Origins]] = {
    "text_encoder": clip_origins,
    "text_encoder_2": clip_origins,
    "text_encoder_3": t5_origins,
}


def folder_weights(part: str, folder: Path, instead: str | None = None) -> PartWeights:
    """The tensors in the safetensors files of a part's folder.

    Args:
        part: which one it is.
        folder: see :func:`sd35_trt.checkpoints.weight_files.weight_files`.
        instead: another way out where it has none, for the message.

    Raises:
        CheckpointError: no safetensors there, one that is truncated or damaged, an adapter, or a
            quantization that is not read.
    """
    files = weight_files(folder, instead)
    tensors = TensorFiles(folder, files, "a file of weights", instead)
    check_plain(folder, tensors.names, folder.name)
    tensors.strip(common_prefix(tensors.names))
    origins = _SPELLINGS.get(part, lambda names: Origin)
    return PartWeights(TensorValues(tensors), files, "", origins)
