"""One part of a model in a file of the original layout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from sd35_trt.errors import CheckpointError

from .contents import refusal
from .diffusers import way_without
from .file_formats import is_gguf
from .gguf import GgufFile
from .original import LAYOUTS, Layout
from .tensor_files import TensorFiles
from .tensor_names import MODEL, Kind, tensors_kind
from .tensor_values import TensorValues
from .text_names import CLIP_ANCHORS
from .weights import PartWeights
from .wrappers import check_plain

_FETCH = "download the file again"

# Widths of the CLIPs, which have the same names.
_WIDTHS = {768: "text_encoder", 1280: "text_encoder_2"}


def open_file(
    path: Path, wanted: str = MODEL, instead: str | None = None
) -> TensorValues | GgufFile:
    """A file of tensors by its content, whatever it is called.

    Args:
        wanted, instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Raises:
        CheckpointError: it cannot be read.
    """
    if is_gguf(path):
        return GgufFile(path)
    return TensorValues(TensorFiles(path, [path], wanted, instead))


def file_kind(file: TensorValues | GgufFile) -> Kind | None:
    """What a GGUF file's tensors are; of other files, their path tells."""
    if isinstance(file, TensorValues):
        return None
    return tensors_kind({name: file.shape(name) for name in file.names})


def find_prefix(file: TensorValues | GgufFile, part: str, alone: bool = False) -> str | None:
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


def own_weights(
    file: TensorValues | GgufFile,
    prefix: str,
    layout: Layout,
    others: Collection[str] | None = None,
) -> PartWeights:
    """The weights of a part in a file; see :class:`PartWeights`."""
    return PartWeights(file, [file.path], prefix, layout.origins, others, _FETCH)


def configure(weights: PartWeights, part: str) -> dict[str, Any]:
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


def open_own_file(path: Path, part: str) -> PartWeights:
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
    return own_weights(file, prefix, layout)


def _other(file: TensorValues | GgufFile, part: str) -> Kind | None:
    """The part that a file holds in place of another."""
    for other, layout in LAYOUTS.items():
        if other != part and find_prefix(file, other, alone=True) is not None:
            return Kind(f"a file of {layout.title}", "")
    return None
