"""A model as one look finds it, before any work: its checkpoint, parts, variant and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sd35_trt.components import COMPONENTS
from sd35_trt.dimensions import SizeLimits
from sd35_trt.store.model_names import hub_origin, model_name
from sd35_trt.variants import Variant, recognise

from .gguf import LIBRARY
from .hub import resolve_model
from .scheduler import SchedulerSource, find_scheduler
from .single_file import AnyCheckpoint, open_checkpoint
from .structure import PUBLISHED, Structure

_Source = TypeVar("_Source", bound=AnyCheckpoint | Structure, covariant=True)
_Opened = TypeVar("_Opened", bound=AnyCheckpoint | Structure)


@dataclass(frozen=True)
class Model(Generic[_Source]):
    """A model, of which headers and configurations have been read.

    Attributes:
        name: what a bundle of it is called.
        checkpoint: its files; of a published model, its structure.
        variant: which model of the family it is.
        scheduler: that it is drawn with.
        sizes: of pictures, that it draws.
        packaged: whether it is the mini that comes with this package.
    """

    name: str
    checkpoint: _Source
    variant: Variant
    scheduler: SchedulerSource
    sizes: SizeLimits
    packaged: bool = False

    @property
    def components(self) -> list[str]:
        """The components that can be made of it, in the contract's order."""
        return [name for name, row in COMPONENTS.items() if self.checkpoint.has(row.part)]

    @property
    def parts(self) -> list[str]:
        """The folders of its parts."""
        return list(dict.fromkeys(COMPONENTS[name].part for name in self.components))

    @property
    def origin(self) -> str | None:
        """Where on the hub it is from, as ``owner/name@revision``; None for any other."""
        return None if isinstance(self.checkpoint, Structure) else hub_origin(self.checkpoint.root)

    @property
    def quantization(self) -> dict[str, str]:
        """Types of the tensors in GGUF files, by the files' names in a bundle's manifest."""
        weights = {part: self.checkpoint.weights(part) for part in self.parts}
        return {
            f"{part}/{own.files[0].name}": own.quantization
            for part, own in weights.items()
            if own is not None and own.quantization is not None
        }

    @property
    def libraries(self) -> tuple[str, ...]:
        """What makes the tensors' values, besides what every build uses."""
        return (LIBRARY,) if self.quantization else ()


def look(
    model: str,
    tokenizers: Path | None = None,
    *,
    scheduler: Path | None = None,
    variant: str | None = None,
    without_t5: bool = False,
) -> Model[AnyCheckpoint]:
    """Look at a model.

    Args:
        model: ``mini``, a diffusers directory, a file in the original layout, or a hub id.
        tokenizers: of a model in a file; see
            :func:`sd35_trt.checkpoints.single_file.open_checkpoint`.
        scheduler: a ``scheduler_config.json``, or a folder with one; None takes the model's.
        variant: which model of the family it is; None asks its structure and its name.
        without_t5: leave out T5, whether or not it is there.

    Raises:
        CheckpointError: no usable checkpoint: something is missing, truncated or not SD3.5's.
        UsageError: tokenizers for a directory, which has its own; no such scheduler; a variant
            that the structure contradicts.
    """
    root = resolve_model(model)
    checkpoint = open_checkpoint(root, tokenizers, without_t5)
    name = model if model == "mini" else model_name(root)
    result = _describe(name, checkpoint, scheduler, variant, model == "mini")
    for part in result.parts:
        checkpoint.config(part)
        checkpoint.weights(part)  # opens every file
    return result


def look_at_structure(
    model: str,
    *,
    scheduler: Path | None = None,
    variant: str | None = None,
    without_t5: bool = False,
) -> Model[AnyCheckpoint | Structure]:
    """As :func:`look`; the published models (:data:`PUBLISHED`) need no checkpoint."""
    if model in PUBLISHED:
        return _describe(model, Structure(model, without_t5), scheduler, variant)
    return look(model, scheduler=scheduler, variant=variant, without_t5=without_t5)


def _describe(
    name: str,
    checkpoint: _Opened,
    scheduler: Path | None,
    variant: str | None,
    packaged: bool = False,
) -> Model[_Opened]:
    transformer = checkpoint.config("transformer")
    return Model(
        name,
        checkpoint,
        recognise(transformer, checkpoint.hint, variant),
        find_scheduler(checkpoint, scheduler),
        SizeLimits.of(transformer),
        packaged,
    )
