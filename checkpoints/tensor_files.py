"""Tensors as safetensors files have them, in one file or in the shards of a folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sd35_trt.errors import CheckpointError

from .contents import refusal, unfinished
from .file_formats import AGAIN, has_header
from .tensor_names import MODEL
from .wrappers import plain_name, plain_names

if TYPE_CHECKING:
    import torch


class TensorFiles:
    """Safetensors files, mapped; names are without wrappers, see :mod:`.wrappers`.

    Args:
        path: the file, or the folder of the files, for messages.
        files: of which no two have a tensor of one name.
        wanted, instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Raises:
        CheckpointError: missing, something else, truncated or damaged.
    """

    def __init__(
        self, path: Path, files: Sequence[Path], wanted: str = MODEL, instead: str | None = None
    ) -> None:
        self.path = path
        # Headers are read without torch: a build that finds its stages done never imports it.
        self._headers = {file: open_safetensors(file, "np", wanted, instead) for file in files}
        self._handles: dict[Path, Any] = {}
        file_of = {name: file for file, header in self._headers.items() for name in header.keys()}  # noqa: SIM118 (not a dict)
        stored = plain_names(path, file_of)
        self._place = {name: (file_of[own], own) for name, own in stored.items()}
        self._prefix = ""

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, scales too."""
        return self._place.keys()

    @property
    def metadata(self) -> list[dict[str, str]]:
        """What the headers say besides, a dictionary for each file."""
        return [header.metadata() or {} for header in self._headers.values()]

    def strip(self, prefix: str) -> None:
        """Take a prefix off all names, which have it."""
        self._prefix += prefix
        self._place = {name.removeprefix(prefix): place for name, place in self._place.items()}

    def own_name(self, name: str) -> str:
        """What a tensor, or a layer, that the files call so is called here."""
        return plain_name(name).removeprefix(self._prefix)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._entry(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as the header spells it, e.g. ``BF16`` or ``F8_E4M3``."""
        return str(self._entry(name).get_dtype())

    def stored(self, name: str) -> torch.Tensor:
        """A tensor as stored, a view of the file."""
        file, stored = self._place[name]
        if file not in self._handles:
            self._handles[file] = open_safetensors(file)
        tensor: torch.Tensor = self._handles[file].get_tensor(stored)
        return tensor

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._place[name][0]

    def _entry(self, name: str) -> Any:
        file, stored = self._place[name]
        return self._headers[file].get_slice(stored)


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
    except (OSError, MemoryError) as error:  # no address space to map it is a MemoryError
        raise refusal(path, wanted, instead) from error
    except (SafetensorError, ValueError) as error:
        if not has_header(path):
            raise refusal(path, wanted, instead) from error
        raise CheckpointError(f"{path} is truncated or damaged ({error})", AGAIN) from error
