"""One part of a model in a file of the original layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.errors import CheckpointError

from .comfy import TensorFile
from .contents import refusal
from .diffusers import way_without
from .file_formats import is_gguf
from .gguf import GgufFile
from .original import LAYOUTS, Layout
from .tensor_names import MODEL, Kind, tensors_kind
from .text_names import CLIP_ANCHORS
from .weights import Weights
from .wrappers import check_plain

if TYPE_CHECKING:
    import torch

_FETCH = "download the file again"

# Widths of the CLIPs, which have the same names.
_WIDTHS = {768: "text_encoder", 1280: "text_encoder_2"}


def open_file(path: Path, wanted: str = MODEL, instead: str | None = None) -> TensorFile | GgufFile:
    """A file of tensors by its content, whatever it is called.

    Args:
        wanted, instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Raises:
        CheckpointError: it cannot be read.
    """
    return GgufFile(path) if is_gguf(path) else TensorFile(path, wanted, instead)


def file_kind(file: TensorFile | GgufFile) -> Kind | None:
    """What a GGUF file's tensors are; of other files, their path tells."""
    if isinstance(file, TensorFile):
        return None
    return tensors_kind({name: file.shape(name) for name in file.names})


def find_prefix(file: TensorFile | GgufFile, part: str, alone: bool = False) -> str | None:
    """What is in front of a part's names in a file; None where the part is not there.

    Args:
        alone: whether the file may be the part's own. A CLIP of the other's width is none then.
    """
    layout = LAYOUTS[part]
    for prefix in (*layout.prefixes, *(layout.alone if alone else ())):
        for anchor in layout.anchors:
            if prefix + anchor in file:
                other = anchor in CLIP_ANCHORS and _WIDTHS.get(file.shape(prefix + anchor)[-1])
                if not (alone and other and other != part):
                    return prefix
    return None


class SingleFileWeights(Weights):
    """A part's tensors by their diffusers names, each made when it is read.

    Args:
        file: what they are in.
        prefix: in front of the part's names there.
        others: prefixes of the other parts in the file, where all else is the part's; None where
            only what has the prefix is.

    Raises:
        CheckpointError: a quantization that is not read here.
    """

    advice = _FETCH

    def __init__(
        self,
        file: TensorFile | GgufFile,
        prefix: str,
        layout: Layout,
        others: Collection[str] | None = None,
    ) -> None:
        self.folder = file.path
        self.files = [file.path]
        self.quantization = file.quantization
        self._in = file
        self._prefix = prefix
        file.check(prefix)
        names = {name.removeprefix(prefix) for name in file.names if name.startswith(prefix)}
        self._origin = layout.origins(names)
        if others is None:
            self._own = {prefix + name for name in names}
        else:
            self._own = {name for name in file.names if not name.startswith(tuple(others))}

    def __contains__(self, name: str) -> bool:
        return self.source(name) in self._in

    def source(self, name: str) -> str:
        """The name of the tensor in the file that a diffusers tensor is made from."""
        return self._prefix + self._origin(name).source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a diffusers tensor, from the header.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        return self._origin(name).shape(self._in.shape(self._stored_name(name)))

    def dtype(self, name: str) -> str:
        """See :meth:`Weights.dtype`."""
        return self._in.value_dtype(self._stored_name(name))

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
        """The largest input magnitude by the file's input scale; None where it has none."""
        return self._in.input_amax(self.source(f"{layer}.weight"))

    def _stored_name(self, name: str) -> str:
        source = self.source(name)
        if source not in self._in:
            raise CheckpointError(f"{self.folder} has no tensor {source!r}", _FETCH)
        return source

    def _file(self, name: str) -> Path:
        return self.folder


def configure(weights: SingleFileWeights, part: str) -> dict[str, Any]:
    """A part's configuration, by its shapes.

    Raises:
        CheckpointError: they are not those of an SD3.5 model.
    """
    layout = LAYOUTS[part]
    try:
        return layout.configure(weights)
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{weights.folder}: the shapes of its {layout.title} are not those of an SD3.5 model",
            _FETCH,
        ) from error


def open_own_file(path: Path, part: str) -> SingleFileWeights:
    """A part in a file of its own, or in one that holds several encoders.

    Raises:
        CheckpointError: it holds something else, or cannot be read.
    """
    layout = LAYOUTS[part]
    wanted, instead = f"the model's {layout.title}", way_without(part)
    file = open_file(path, wanted, instead)
    prefix = find_prefix(file, part, alone=True)
    if prefix is None:
        raise refusal(path, wanted, instead, _other(file, part) or file_kind(file))
    check_plain(path, file.names, wanted)
    return SingleFileWeights(file, prefix, layout)


def _other(file: TensorFile | GgufFile, part: str) -> Kind | None:
    """The part that a file holds in place of another."""
    for other, layout in LAYOUTS.items():
        if other != part and find_prefix(file, other, alone=True) is not None:
            return Kind(f"a file of {layout.title}", "")
    return None
