"""A model as one look finds it, before any work: its checkpoint, parts, variant and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sd35_trt.components import COMPONENTS
from sd35_trt.dimensions import SizeLimits
from sd35_trt.errors import UsageError
from sd35_trt.store.hub import model_name, resolve_model
from sd35_trt.variants import Variant, recognise

from .beside import OPTIONS
from .checks import check_parts, check_tokenizers
from .findings import Findings
from .gguf import LIBRARY
from .given_parts import open_parts
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
        notes: what of it stays unused, a sentence each.
        packaged: whether it is the mini that comes with this package, with its own parts.
    """

    name: str
    checkpoint: _Source
    variant: Variant
    scheduler: SchedulerSource
    sizes: SizeLimits
    notes: tuple[str, ...] = ()
    packaged: bool = False

    @property
    def components(self) -> list[str]:
        """The components that can be made of it, in the contract's order."""
        return _components(self.checkpoint)

    @property
    def parts(self) -> list[str]:
        """The folders of its parts."""
        return _parts(self.checkpoint)

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
    parts: Mapping[str, Path] | None = None,
) -> Model[AnyCheckpoint]:
    """Look at a model: headers, configurations and tokenizers, but no values of tensors.

    Args:
        model: ``mini``, a diffusers directory, a file in the original layout, or a hub id.
        tokenizers: of a model in a file; see
            :func:`sd35_trt.checkpoints.single_file.open_checkpoint`.
        scheduler: a ``scheduler_config.json``, or a folder with one; None takes the model's.
        variant: which model of the family it is; None asks its structure and its name.
        parts: part → file or folder in place of the model's own; see
            :class:`sd35_trt.checkpoints.given_parts.PartOptions`.

    Raises:
        CheckpointError: no usable checkpoint: something is missing, truncated or not SD3.5's. It
            has a line for each part that is not usable.
        UsageError: tokenizers for a directory, which has its own; no such scheduler or part; a
            variant that the structure contradicts.
    """
    return _look(model, tokenizers, scheduler, variant, parts or {}, tokenized=True)


def look_at_structure(
    model: str,
    *,
    scheduler: Path | None = None,
    variant: str | None = None,
    parts: Mapping[str, Path] | None = None,
) -> Model[AnyCheckpoint | Structure]:
    """As :func:`look`, without tokenizers; the published models (:data:`PUBLISHED`) need no
    checkpoint.

    Raises:
        UsageError: see :func:`look`; also parts for a published model, which has no others.
    """
    if model not in PUBLISHED:
        return _look(model, None, scheduler, variant, parts or {}, tokenized=False)
    if parts:
        option = OPTIONS[next(iter(parts))]
        raise UsageError(
            f"{option} needs a checkpoint; {model} is planned by its structure",
            f"leave out {option}, or give a file or a folder as --model",
        )
    structure = Structure(model)
    return _describe(model, structure, find_scheduler(structure, scheduler), variant)


def _look(
    model: str,
    tokenizers: Path | None,
    scheduler: Path | None,
    variant: str | None,
    parts: Mapping[str, Path],
    tokenized: bool,
) -> Model[AnyCheckpoint]:
    root, findings = resolve_model(model), Findings()
    checkpoint = open_checkpoint(root, tokenizers, open_parts(parts))
    configs = check_parts(checkpoint, _parts(checkpoint), findings)
    notes: list[str] = []
    if tokenized:
        notes = check_tokenizers(checkpoint, _components(checkpoint), configs, findings)
    with findings.part():
        source = find_scheduler(checkpoint, scheduler)
    findings.tell()
    name = model_name(model, root)
    packaged = model == "mini" and not parts
    return _describe(name, checkpoint, source, variant, tuple(notes), packaged)


def _describe(
    name: str,
    checkpoint: _Opened,
    scheduler: SchedulerSource,
    variant: str | None,
    notes: tuple[str, ...] = (),
    packaged: bool = False,
) -> Model[_Opened]:
    transformer = checkpoint.config("transformer")
    return Model(
        name,
        checkpoint,
        recognise(transformer, checkpoint.hint, variant),
        scheduler,
        SizeLimits.of(transformer),
        notes,
        packaged,
    )


def _components(checkpoint: AnyCheckpoint | Structure) -> list[str]:
    return [name for name, row in COMPONENTS.items() if checkpoint.has(row.part)]


def _parts(checkpoint: AnyCheckpoint | Structure) -> list[str]:
    return list(dict.fromkeys(COMPONENTS[name].part for name in _components(checkpoint)))
