"""Reading a diffusers-layout SD3.5 checkpoint, one tensor at a time."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sd35_trt.components import OPTIONAL_PARTS
from sd35_trt.errors import CheckpointError
from sd35_trt.store.hub import telling_name

from .configuration import class_name, complete
from .origin import Origins
from .text_names import clip_origins, t5_origins

if TYPE_CHECKING:
    import torch

# Base names diffusers and transformers save under, the full-precision file before its variant.
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")

_FETCH = "download the checkpoint again"


def read_json(path: Path, fix: str = _FETCH) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        fix: what the user is told to do where it cannot be read.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", fix) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object", fix)
    return data


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

    # What to do where a tensor is not what the configuration asks for.
    advice = "use the config.json that belongs to these weights"

    @abc.abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""

    @abc.abstractmethod
    def dtype(self, name: str) -> str:
        """Type of a tensor as its file's header spells it, such as ``BF16``."""

    @abc.abstractmethod
    def unused(self, names: Iterable[str]) -> list[str]:
        """What is stored for the part besides some tensors, by the names in the file, sorted."""

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

    def input_amax(self, layer: str) -> float | None:
        """The largest input magnitude by the layer's input scale; None where it has none."""
        return None

    def source(self, name: str) -> str:
        """The tensor's own name in its file."""
        return name

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what the configuration asks for.

        Raises:
            CheckpointError: names the first tensor that is missing or of another shape.
        """
        missing = [name for name in shapes if name not in self]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            source = self.source(missing[0])
            raise CheckpointError(f"{self.folder} has no tensor {source!r}{more}", _FETCH)
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


class FolderWeights(Weights):
    """The tensors in the safetensors files of a part's folder.

    Args:
        folder: the part's folder; sharded, single, full-precision and ``.fp16`` files are found.

    Raises:
        CheckpointError: no safetensors there, or one that is truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        # Headers are read without torch: a build that finds its stages done never imports it.
        self._headers = {path: open_safetensors(path, "np") for path in self.files}
        self._handles: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for path, header in self._headers.items():
            for name in header.keys():  # noqa: SIM118 (not a dict)
                self._file_of[name] = path

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._headers[self._file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor, from the header."""
        return str(self._headers[self._file_of[name]].get_slice(name).get_dtype())

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`."""
        return sorted(self._file_of.keys() - set(names))

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, a view of the file.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}", _FETCH)
        path = self._file_of[name]
        if path not in self._handles:
            self._handles[path] = open_safetensors(path)
        tensor: torch.Tensor = self._handles[path].get_tensor(name)
        return tensor

    def _file(self, name: str) -> Path:
        return self._file_of[name]


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
        """Type of the tensor that a tensor is made from."""
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
    return RespelledWeights(weights, spellings[part](weights.unused(())))


def open_safetensors(path: Path, framework: str = "pt") -> Any:
    """A safetensors file, mapped.

    Args:
        framework: ``pt``, or ``np`` to read its header without torch.

    Raises:
        CheckpointError: missing, not readable, truncated or damaged.
    """
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", _FETCH) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", _FETCH) from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error})", _FETCH) from error


def _weight_files(folder: Path) -> list[Path]:
    for variant in _VARIANTS:
        for stem in _STEMS:
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                names = read_json(index).get("weight_map")
                if not isinstance(names, dict) or not names:
                    raise CheckpointError(f"{index} has no weight_map", _FETCH)
                return [folder / name for name in sorted(set(names.values()))]
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
    raise CheckpointError(f"{folder} holds no .safetensors file", _FETCH)


@dataclass(frozen=True)
class Part:
    """A part in place of a model's own.

    Attributes:
        name: its folder in a model directory.
        path: what it was opened from, by ``opener``.
        place: the file with its configuration, for messages.
        class_name: that its configuration names; None for none.
        config: see :func:`sd35_trt.checkpoints.configuration.complete`.
        files: what it depends on.
    """

    name: str
    path: Path
    opener: Callable[[str, Path], Part]
    place: Path
    class_name: str | None
    config: Mapping[str, Any]
    weights: Weights
    files: list[Path]

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself.
        return self.opener, (self.name, self.path)


class Checkpoint:
    """A model directory in the diffusers layout of ``StableDiffusion3Pipeline``.

    Args:
        given: parts in place of its own.

    Raises:
        CheckpointError: not such a directory.
    """

    def __init__(self, root: Path, given: Mapping[str, Part] | None = None) -> None:
        self.root = root
        self.given = dict(given or {})
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a directory", "give a diffusers model directory")
        index = root / "model_index.json"
        if not index.is_file():
            raise CheckpointError(
                f"{root} is not a diffusers model directory (no model_index.json)",
                "save the model with StableDiffusion3Pipeline.save_pretrained",
            )
        self.index = read_json(index)
        kind = self.index.get("_class_name")
        if kind != "StableDiffusion3Pipeline":
            raise CheckpointError(
                f"{root} holds a {kind}, not a StableDiffusion3Pipeline",
                "give a Stable Diffusion 3.5 model",
            )

    @property
    def hint(self) -> str:
        """The name that tells the variant, for :func:`sd35_trt.variants.recognise`.

        Not ``_name_or_path``: a fine-tune keeps that of the model it began with.
        """
        return telling_name(self.root)

    def has(self, part: str) -> bool:
        """Whether the checkpoint comes with this part; only T5 may be left out."""
        if part in self.given:
            return True
        listed = self.index.get(part)
        absent = listed is None or listed == [None, None]
        return not (part in OPTIONAL_PARTS and (absent or not (self.root / part).is_dir()))

    def place(self, part: str) -> Path:
        """The file with the part's configuration."""
        if part in self.given:
            return self.given[part].place
        return self.root / part / "config.json"

    def class_name(self, part: str) -> str | None:
        """The class that the part's configuration, or else the index, names; None for none.

        Raises:
            CheckpointError: the configuration is missing or unreadable.
        """
        if part in self.given:
            return self.given[part].class_name
        listed = self.index.get(part)
        indexed = listed[-1] if isinstance(listed, list) and listed else None
        name = class_name(read_json(self.place(part))) or indexed
        return None if name is None else str(name)

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration; see :func:`sd35_trt.checkpoints.configuration.complete`.

        Raises:
            CheckpointError: missing or unreadable.
        """
        if part in self.given:
            return dict(self.given[part].config)
        return complete(part, read_json(self.place(part)))

    def weights(self, part: str) -> Weights:
        """Opens the part's safetensors files; see :class:`Weights`."""
        if part in self.given:
            return self.given[part].weights
        return respelled(part, FolderWeights(self.root / part))

    def input_amax(self, layers: list[str]) -> dict[str, float]:
        """Input magnitudes by ``component/layer`` that the weights' files hold: none do."""
        return {}

    def tokenizer(self, folder: str) -> Path:
        """The directory of a tokenizer.

        Raises:
            CheckpointError: it is missing.
        """
        path = self.root / folder
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing", _FETCH)
        return path

    def files(self, folder: str) -> list[Path]:
        """What a folder's result depends on: configuration and weights, or a tokenizer's files.

        Raises:
            CheckpointError: the folder is missing.
        """
        if folder.startswith("tokenizer"):
            return tokenizer_files(self.tokenizer(folder))
        if folder in self.given:
            return self.given[folder].files
        path = self.root / folder
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing", _FETCH)
        return [path / "config.json", *_weight_files(path)]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer."""
    return sorted(file for file in folder.iterdir() if file.is_file())
