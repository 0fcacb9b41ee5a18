"""Reading a diffusers-layout SD3.5 checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.components import COMPONENTS, CONTROLNET, OPTIONAL_PARTS, part_kind
from sd35_trt.errors import CheckpointError
from sd35_trt.store.model_names import telling_name

from .configuration import class_name, complete
from .contents import describe, refusal
from .quantized_weight import check_method
from .tensor_names import SD35
from .weight_files import read_json, weight_files
from .weights import Weights, folder_weights

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

# Tokenizer's folder → its text encoder.
_ENCODERS = {row.tokenizer: row.part for row in COMPONENTS.values() if row.tokenizer}


def way_without(part: str) -> str | None:
    """What else can be done where a part cannot be read; None where it is needed."""
    return "build without T5: --no-t5" if part in OPTIONAL_PARTS else None


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
        without_t5: leave out T5, whether or not it is there.
        given: parts in place of its own.

    Raises:
        CheckpointError: not such a directory.
    """

    def __init__(
        self, root: Path, without_t5: bool = False, given: Mapping[str, Part] | None = None
    ) -> None:
        self.root = root
        self.given = dict(given or {})
        self._without_t5 = without_t5
        index = root / "model_index.json"
        if not index.is_file():
            raise refusal(root)
        self.index = read_json(index)
        name = self.index.get("_class_name")
        if not isinstance(name, str) or name not in _PIPELINES:
            raise refusal(root)

    @property
    def hint(self) -> str:
        """The name that tells the variant, for :func:`sd35_trt.variants.recognise`.

        Not ``_name_or_path``: a fine-tune keeps that of the model it began with.
        """
        return telling_name(self.root)

    def has(self, part: str) -> bool:
        """Whether the model has this part; only T5 may be left out, ControlNets are given."""
        if part_kind(part) == CONTROLNET:
            return part in self.given
        if part not in OPTIONAL_PARTS:
            return True
        return not self._without_t5 and (part in self.given or self._lists(part))

    def place(self, part: str) -> Path:
        """The file with the part's configuration."""
        if part in self.given:
            return self.given[part].place
        return self.root / part / "config.json"

    def class_name(self, part: str) -> str | None:
        """The class that the part's configuration, or else the index, names; None for none.

        Raises:
            CheckpointError: see :meth:`config`.
        """
        if part in self.given:
            return self.given[part].class_name
        listed = self.index.get(part)
        indexed = listed[-1] if isinstance(listed, list) and listed else None
        name = class_name(self._stored_config(part)) or indexed
        return None if name is None else str(name)

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration; see :func:`sd35_trt.checkpoints.configuration.complete`.

        Raises:
            CheckpointError: the part is listed and absent, or the other way round; a configuration
                that is missing or unreadable, or names a quantization that is not read.
        """
        if part in self.given:
            return dict(self.given[part].config)
        return read_config(part, self.place(part), self._stored_config(part))

    def weights(self, part: str) -> Weights:
        """Opens the part's safetensors files; see :class:`Weights`.

        Raises:
            CheckpointError: there are none that can be read.
        """
        if part in self.given:
            return self.given[part].weights
        return folder_weights(part, self.root / part, way_without(part))

    def tokenizer(self, folder: str) -> Path:
        """The directory of a tokenizer.

        Raises:
            CheckpointError: it is not listed, or missing.
        """
        instead = way_without(_ENCODERS[folder])
        self._check_listed(folder, instead)
        path = self.root / folder
        check_tokenizer(path, instead)
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
        return [path / "config.json", *weight_files(path)]

    def _lists(self, folder: str) -> bool:
        return self.index.get(folder) not in (None, [None, None])

    def _check_listed(self, folder: str, instead: str | None) -> None:
        if not self._lists(folder):
            raise CheckpointError(
                f"{self.root / 'model_index.json'} lists no {folder}",
                SD35 if instead is None else instead,
            )

    def _stored_config(self, part: str) -> dict[str, Any]:
        instead = way_without(part)
        if part in _ENCODERS.values():
            self._check_listed(part, instead)
        path = self.root / part
        if not path.is_dir() or not any(path.iterdir()):
            raise refusal(path, "a folder of the model", instead)
        return read_json(path / "config.json")


def read_config(part: str, path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a part as its class takes it.

    Args:
        path: the file, for messages.
        data: what it holds.

    Raises:
        CheckpointError: it names a quantization that is not read.
    """
    check_method(path, data)
    return complete(part, {k: v for k, v in data.items() if k != "quantization_config"})


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
