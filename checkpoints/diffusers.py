"""Reading a diffusers-layout SD3.5 checkpoint, one tensor at a time."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sd35_trt.components import COMPONENTS, OPTIONAL_PARTS
from sd35_trt.errors import CheckpointError
from sd35_trt.store.model_names import telling_name

from .contents import describe, refusal, unfinished
from .file_formats import AGAIN, has_header
from .quantized import Quantized, check_method, quantized_weights, stored_fp8
from .tensor_names import MODEL, SD35
from .weight_files import read_json, weight_files
from .wrappers import check_plain, common_prefix, plain_names

if TYPE_CHECKING:
    import torch

# Pipelines of one and the same model. A ControlNet among their parts is not part of a bundle.
_PIPELINES = frozenset(
    f"StableDiffusion3{task}Pipeline"
    for task in (
        "",
        "Img2Img",
        "Inpaint",
        "PAG",
        "PAGImg2Img",
        "ControlNet",
        "ControlNetInpainting",
    )
)

#: Text encoder → its tokenizer's folder.
_TOKENIZERS = {row.part: row.tokenizer for row in COMPONENTS.values() if row.tokenizer}


def way_without(part: str) -> str | None:
    """What else can be done where a part cannot be read; None where it is needed."""
    return "build without T5: --no-t5" if part in OPTIONAL_PARTS else None


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

    # What to do where a shape is not what the configuration asks for.
    _advice = "use the config.json that belongs to these weights"

    @abc.abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""

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
                    self._advice,
                )

    @abc.abstractmethod
    def _file(self, name: str) -> Path:
        """The file that a tensor is in."""


class FolderWeights(Weights):
    """The tensors in the safetensors files of a part's folder.

    Args:
        folder: the part's folder; see :func:`sd35_trt.checkpoints.weight_files.weight_files`.
        instead: another way out where it has none, for the message.

    Raises:
        CheckpointError: no safetensors there, one that is truncated or damaged, or an adapter.
    """

    def __init__(self, folder: Path, instead: str | None = None) -> None:
        self.folder = folder
        self.files = weight_files(folder, instead)
        # Headers are read without torch: a build that finds its stages done never imports it.
        wanted = "a file of weights"
        self._headers = {path: open_safetensors(path, "np", wanted, instead) for path in self.files}
        self._handles: dict[Path, Any] = {}
        file_of = {name: path for path, header in self._headers.items() for name in header.keys()}  # noqa: SIM118 (not a dict)
        check_plain(folder, file_of, folder.name)
        plain = plain_names(folder, file_of)
        prefix = common_prefix(plain)
        self._place = {
            name.removeprefix(prefix): (file_of[stored], stored) for name, stored in plain.items()
        }
        self._quantized: dict[str, Quantized] = {}
        self._quantized = quantized_weights(self)

    @property
    def path(self) -> Path:
        """The folder, for messages about its tensors."""
        return self.folder

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, scales too."""
        return self._place.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._place or name in self._quantized

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor's values, from the header."""
        if name in self._quantized:
            return self._quantized[name].shape
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

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values: as stored, a view of the file; those of a quantized one.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        if name not in self:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}", AGAIN)
        weight = self._quantized.get(name)
        return self.stored(name) if weight is None else weight.values()

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`."""
        return stored_fp8(self, name, self._quantized)

    def _entry(self, name: str) -> Any:
        path, stored = self._place[name]
        return self._headers[path].get_slice(stored)

    def _file(self, name: str) -> Path:
        return self._place[name][0]


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


class Checkpoint:
    """A model directory in the diffusers layout of ``StableDiffusion3Pipeline``.

    Args:
        without_t5: leave out T5, whether or not it is there.

    Raises:
        CheckpointError: not such a directory, or one that lacks a part that its index lists.
    """

    def __init__(self, root: Path, without_t5: bool = False) -> None:
        self.root = root
        self._without_t5 = without_t5
        index = root / "model_index.json"
        if not index.is_file():
            raise refusal(root)
        self.index = read_json(index)
        name = self.index.get("_class_name")
        if not isinstance(name, str) or name not in _PIPELINES:
            raise refusal(root)
        for part, tokenizer in _TOKENIZERS.items():
            self._check_listed(part, tokenizer)

    def _check_listed(self, part: str, tokenizer: str) -> None:
        """Refuse a text encoder that is listed without being there, or without its tokenizer.

        Raises:
            CheckpointError: names the folder.
        """
        instead = way_without(part)
        if not self.has(part):
            return
        for folder in (part, tokenizer):
            if not self._lists(folder):
                raise CheckpointError(
                    f"{self.root / 'model_index.json'} lists no {folder}",
                    SD35 if instead is None else instead,
                )
        path = self.root / part
        if not path.is_dir() or not any(path.iterdir()):
            raise refusal(path, "a folder of the model", instead)
        check_tokenizer(self.root / tokenizer, instead)

    def _lists(self, folder: str) -> bool:
        return self.index.get(folder) not in (None, [None, None])

    @property
    def hint(self) -> str:
        """The name that tells the variant, for :func:`sd35_trt.variants.recognise`.

        Not ``_name_or_path``: a fine-tune keeps that of the model it began with.
        """
        return telling_name(self.root)

    def has(self, part: str) -> bool:
        """Whether the model has this part; only T5 may be left out."""
        return part not in OPTIONAL_PARTS or (self._lists(part) and not self._without_t5)

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration, without the keys that begin with an underscore.

        Raises:
            CheckpointError: missing or unreadable.
        """
        path = self.root / part / "config.json"
        data = read_json(path)
        quantization = data.pop("quantization_config", None)
        if isinstance(quantization, dict):
            check_method(path, quantization)
        return {key: value for key, value in data.items() if not key.startswith("_")}

    def weights(self, part: str) -> Weights:
        """Opens the part's safetensors files; see :class:`Weights`.

        Raises:
            CheckpointError: there are none that can be read.
        """
        return FolderWeights(self.root / part, way_without(part))

    def input_amax(self, layers: list[str]) -> dict[str, float]:
        """Input magnitudes by ``component/layer`` that the weights' files hold: none do."""
        return {}

    def tokenizer(self, folder: str) -> Path:
        """The directory of a tokenizer.

        Raises:
            CheckpointError: it is missing.
        """
        path = self.root / folder
        check_tokenizer(path)
        return path

    def files(self, folder: str) -> list[Path]:
        """What a folder's result depends on: configuration and weights, or a tokenizer's files.

        Raises:
            CheckpointError: the folder is missing.
        """
        if folder.startswith("tokenizer"):
            return tokenizer_files(self.tokenizer(folder))
        path = self.root / folder
        return [path / "config.json", *weight_files(path)]


def check_tokenizer(folder: Path, instead: str | None = None) -> None:
    """Refuse a tokenizer's folder that is missing or empty, or has a file that is broken.

    Args:
        instead: another way out, for the message.

    Raises:
        CheckpointError: names the folder or the file.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in entries or [folder]:
        if not entries or describe(path).broken:
            raise refusal(path, "a tokenizer", instead)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer."""
    return sorted(file for file in folder.iterdir() if file.is_file())
