"""Checkpoints in one file of the original layout, with what is beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from sd35_trt.components import OPTIONAL_PARTS
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.store.model_names import telling_name

from .beside import find_beside
from .contents import describe, refusal
from .diffusers import Checkpoint, Part, check_tokenizer, tokenizer_files
from .original import LAYOUTS
from .part_files import (
    configure,
    file_kind,
    find_prefix,
    open_file,
    open_own_file,
    own_weights,
)
from .repository import fetch_tokenizers
from .tensor_names import MODEL
from .weights import PartWeights, Weights
from .wrappers import check_plain


class SingleFileCheckpoint:
    """A model in one file of the original layout; its interface is that of :class:`Checkpoint`.

    Text encoders and the autoencoder may be in files beside it. The parts' configurations come
    from their shapes.

    Args:
        path: the file with the transformer.
        tokenizers: a directory with the folders ``tokenizer``, ``tokenizer_2``, ``tokenizer_3``;
            None looks beside the file, then on the hub.
        without_t5: leave out T5, whether or not it is there.
        given: parts in place of those that are in the file or beside it.

    Raises:
        CheckpointError: no SD3.5, or a file that cannot be read.
    """

    def __init__(
        self,
        path: Path,
        tokenizers: Path | None = None,
        without_t5: bool = False,
        given: Mapping[str, Part] | None = None,
    ) -> None:
        self.root = path
        self.given = dict(given or {})
        self._tokenizers = tokenizers
        self._without_t5 = without_t5
        self._parts: dict[str, Weights] = {part: p.weights for part, p in self.given.items()}
        self._configs = {part: dict(p.config) for part, p in self.given.items()}
        file = open_file(path)
        inside = {
            part: prefix for part in LAYOUTS if (prefix := find_prefix(file, part)) is not None
        }
        if "transformer" not in inside:
            raise refusal(path, kind=file_kind(file))
        check_plain(path, file.names, MODEL)
        others = [prefix for part, prefix in inside.items() if part != "transformer"]
        # What is wrong with a part is told when the part is asked for.
        self._failures: dict[str, CheckpointError] = {}
        for part, layout in LAYOUTS.items():
            if part in self.given or (without_t5 and part in OPTIONAL_PARTS):
                continue
            try:
                weights: PartWeights | None
                if part in inside:
                    all_else = others if part == "transformer" else None
                    weights = own_weights(file, inside[part], layout, all_else)
                else:
                    place = find_beside(path, part)
                    weights = None if place is None else open_own_file(place, part)
                if weights is not None:
                    self._configs[part] = configure(weights, part)
                    self._parts[part] = weights
            except CheckpointError as error:
                self._failures[part] = error

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself.
        return SingleFileCheckpoint, (self.root, self._tokenizers, self._without_t5, self.given)

    @property
    def hint(self) -> str:
        """The name that tells the variant, for :func:`sd35_trt.variants.recognise`."""
        return telling_name(self.root)

    def has(self, part: str) -> bool:
        """Whether the part was found; only T5 may be missing."""
        dropped = self._without_t5 and part in OPTIONAL_PARTS
        return not dropped and (part in self._parts or part in self._failures)

    def place(self, part: str) -> Path:
        """The file with the part."""
        return self.given[part].place if part in self.given else self._parts[part].folder

    def class_name(self, part: str) -> str | None:
        """The class that the part's configuration names; files name none."""
        return self.given[part].class_name if part in self.given else None

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration.

        Raises:
            CheckpointError: see :meth:`weights`.
        """
        self.weights(part)
        return dict(self._configs[part])

    def weights(self, part: str) -> Weights:
        """The part's tensors.

        Raises:
            CheckpointError: the part is not found, or its file cannot be read.
        """
        if part in self._failures:
            raise self._failures[part]
        return self._parts[part]

    def tokenizer(self, folder: str) -> Path:
        """The directory of a tokenizer; fetched from the hub where it is not here.

        Raises:
            CheckpointError: it is neither.
        """
        if self._tokenizers is None and not (self.root.parent / folder).is_dir():
            return self._fetched / folder
        path = (self._tokenizers or self.root.parent) / folder
        check_tokenizer(path, "give the folder that has it: --tokenizers DIR")
        return path

    def files(self, folder: str) -> list[Path]:
        """What a folder's result depends on, beside its configuration.

        Raises:
            CheckpointError: a tokenizer is missing.
        """
        if folder.startswith("tokenizer"):
            return tokenizer_files(self.tokenizer(folder))
        return self.given[folder].files if folder in self.given else self.weights(folder).files

    @cached_property
    def _fetched(self) -> Path:
        return fetch_tokenizers(self.root)


#: What :func:`open_checkpoint` gives.
OpenedCheckpoint: TypeAlias = Checkpoint | SingleFileCheckpoint


def open_checkpoint(
    path: Path,
    tokenizers: Path | None = None,
    without_t5: bool = False,
    given: Mapping[str, Part] | None = None,
) -> OpenedCheckpoint:
    """Open a diffusers model directory, or a file in the original layout.

    Args:
        tokenizers, without_t5: see :class:`SingleFileCheckpoint`.
        given: parts in place of the model's own.

    Raises:
        CheckpointError: it is neither.
        UsageError: tokenizers for a directory, which has its own.
    """
    if not path.is_dir():
        if describe(path).title == "missing":
            raise CheckpointError(
                f"{path} is missing",
                "give a diffusers model directory, a .safetensors or .gguf file or a hub id",
            )
        return SingleFileCheckpoint(path, tokenizers, without_t5, given)
    checkpoint = Checkpoint(path, without_t5, given)
    if tokenizers is not None:
        raise UsageError(f"{path} has tokenizers of its own", "leave out --tokenizers")
    return checkpoint
