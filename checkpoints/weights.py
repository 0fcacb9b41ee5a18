"""The tensors of one part of a model, one at a time, by diffusers' and transformers' names."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sd35_trt.errors import CheckpointError

from .contents import refusal, unfinished
from .file_formats import AGAIN, has_header
from .origin import Origins
from .quantized import quantized_weights, stored_fp8
from .tensor_names import MODEL
from .text_names import clip_origins, t5_origins
from .weight_files import weight_files
from .wrappers import check_plain, common_prefix, plain_names

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


class FolderTensors:
    """Tensors as the safetensors files of a folder have them, without wrappers and common prefix.

    Args:
        folder: for messages.
        files: in it.
        instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Raises:
        CheckpointError: a file that is truncated or damaged, or an adapter.
    """

    def __init__(self, folder: Path, files: Sequence[Path], instead: str | None = None) -> None:
        self.path = folder
        # Headers are read without torch: a build that finds its stages done never imports it.
        wanted = "a file of weights"
        self._headers = {path: open_safetensors(path, "np", wanted, instead) for path in files}
        self._handles: dict[Path, Any] = {}
        file_of = {name: path for path, header in self._headers.items() for name in header.keys()}  # noqa: SIM118 (not a dict)
        check_plain(folder, file_of, folder.name)
        plain = plain_names(folder, file_of)
        prefix = common_prefix(plain)
        self._place = {
            name.removeprefix(prefix): (file_of[stored], stored) for name, stored in plain.items()
        }

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, scales too."""
        return self._place.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._entry(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as the header spells it, e.g. ``BF16`` or ``F8_E4M3``."""
        return str(self._entry(name).get_dtype())

    def stored(self, name: str) -> torch.Tensor:
        """A tensor as stored, a view of the file."""
        path, stored = self._place[name]
        if path not in self._handles:
            self._handles[path] = open_safetensors(path)
        tensor: torch.Tensor = self._handles[path].get_tensor(stored)
        return tensor

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._place[name][0]

    def _entry(self, name: str) -> Any:
        path, stored = self._place[name]
        return self._headers[path].get_slice(stored)


class FolderWeights(Weights):
    """The tensors in the safetensors files of a part's folder.

    Args:
        folder: the part's folder; see :func:`sd35_trt.checkpoints.weight_files.weight_files`.
        instead: another way out where it has none, for the message.

    Raises:
        CheckpointError: no safetensors there, one that is truncated or damaged, an adapter, or
            a quantization that is not read.
    """

    def __init__(self, folder: Path, instead: str | None = None) -> None:
        self.folder = folder
        self.files = weight_files(folder, instead)
        self._in = FolderTensors(folder, self.files, instead)
        self._quantized = quantized_weights(self._in)
        beside = (weight.beside for weight in self._quantized.values())
        self.names = self._quantized.keys() | set(self._in.names).difference(*beside)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """See :meth:`Weights.shape`."""
        weight = self._quantized.get(name)
        return self._in.shape(name) if weight is None else weight.shape

    def dtype(self, name: str) -> str:
        """See :meth:`Weights.dtype`."""
        return "F32" if name in self._quantized else self._in.dtype(name)

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`."""
        return sorted(self.names - set(names))

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values: as stored, a view of the file; those of a quantized one.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        if name not in self:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}", AGAIN)
        weight = self._quantized.get(name)
        return self._in.stored(name) if weight is None else weight.values()

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`."""
        return stored_fp8(self._in, name, self._quantized)

    def _file(self, name: str) -> Path:
        stored = name in self._in.names
        return self._in.file(name if stored else min(self._quantized[name].beside))


class RespelledWeights(Weights):
    """Tensors of a folder whose files spell them in another way.

    Args:
        weights: by the names in the files.
        origins: from diffusers' or transformers' names to those.
    """

    def __init__(self, weights: Weights, origins: Origins) -> None:
        self.folder, self.files = weights.folder, weights.files
        self._in, self._origin = weights, origins

    def __contains__(self, name: str) -> bool:
        return self.source(name) in self._in

    def source(self, name: str) -> str:
        """See :meth:`Weights.source`."""
        return self._origin(name).source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._origin(name).shape(self._in.shape(self.source(name)))

    def dtype(self, name: str) -> str:
        """See :meth:`Weights.dtype`."""
        return self._in.dtype(self.source(name))

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`."""
        return self._in.unused({self.source(name) for name in names})

    def read(self, name: str) -> torch.Tensor:
        """See :meth:`Weights.read`."""
        return self._origin(name).take(self._in.read(self.source(name)))

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`."""
        origin = self._origin(name)
        pair = self._in.fp8(origin.source) if origin.scaled else None
        return None if pair is None else (origin.take(pair[0]), pair[1])

    def _file(self, name: str) -> Path:
        return self._in._file(self.source(name))


def respelled(part: str, weights: FolderWeights) -> Weights:
    """The weights of a part's folder by transformers' names, whatever its files call them."""
    spellings = {
        "text_encoder": clip_origins,
        "text_encoder_2": clip_origins,
        "text_encoder_3": t5_origins,
    }
    if part not in spellings:
        return weights
    return RespelledWeights(weights, spellings[part](weights.names))


def open_safetensors(
    path: Path, framework: str = "pt", wanted: str = MODEL, instead: str | None = None
) -> Any:
    """A safetensors file, mapped.

    Args:
        framework: ``pt``, or ``np`` to read its header without torch.
        wanted, instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Raises:
        CheckpointError: missing, not readable, something else, truncated or damaged.
    """
    # aria2 gives a file its full length before it has the data.
    if not path.is_file() or unfinished(path):
        raise refusal(path, wanted, instead)
    try:
        return safe_open(path, framework=framework)
    except OSError as error:
        raise refusal(path, wanted, instead) from error
    except (SafetensorError, ValueError) as error:
        if not has_header(path):
            raise refusal(path, wanted, instead) from error
        raise CheckpointError(f"{path} is truncated or damaged ({error})", AGAIN) from error
