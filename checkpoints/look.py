"""A model as one look finds it, before any work: its checkpoint, parts, variant and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from sd35_trt.components import (
    COMPONENTS,
    CONTROLNET,
    component_row,
    control_part,
    part_kind,
    part_rows,
)
from sd35_trt.dimensions import SizeLimits
from sd35_trt.errors import UsageError
from sd35_trt.store.model_names import hub_origin, model_name
from sd35_trt.variants import Variant, recognise

from .adapter_file import AdapterFile
from .checks import check_parts, check_tokenizers
from .controlnets import Net, check_nets, describe_nets, open_nets
from .findings import Findings
from .gguf import LIBRARY
from .given_parts import open_parts
from .hub import resolve_model
from .merged import AnyCheckpoint, MergedCheckpoint, MergedLora, merge_loras
from .model_options import OPTIONS, ModelOptions
from .scheduler import SchedulerSource, find_scheduler
from .single_file import OpenedCheckpoint, open_checkpoint
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
        nets: ControlNets that are built with it.
    """

    name: str
    checkpoint: _Source
    variant: Variant
    scheduler: SchedulerSource
    sizes: SizeLimits
    notes: tuple[str, ...] = ()
    packaged: bool = False
    nets: tuple[Net, ...] = ()

    @property
    def components(self) -> list[str]:
        """The components that can be made of it, in the contract's order."""
        return _components(self.checkpoint)

    @property
    def parts(self) -> list[str]:
        """The folders of its parts."""
        return _parts(self.checkpoint)

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
    def loras(self) -> tuple[MergedLora, ...]:
        """What is merged into its weights, in turn."""
        checkpoint = self.checkpoint
        return checkpoint.loras if isinstance(checkpoint, MergedCheckpoint) else ()

    @property
    def control_blocks(self) -> int:
        """Of each ControlNet; 0 where there are none."""
        counts = (self.checkpoint.config(control_part(net.name)) for net in self.nets)
        return max((config["num_layers"] for config in counts), default=0)

    @property
    def libraries(self) -> tuple[str, ...]:
        """What makes the tensors' values, besides what every build uses."""
        return (LIBRARY,) if self.quantization else ()


def look(options: ModelOptions) -> Model[AnyCheckpoint]:
    """Look at a model: headers, configurations and tokenizers, but no values of tensors.

    Raises:
        CheckpointError: no usable checkpoint: something is missing, truncated or not SD3.5's. It
            has a line for each part that is not usable.
        UsageError: tokenizers for a directory, which has its own; no such scheduler or part; a
            variant that the structure contradicts.
    """
    return _look(options, tokenized=True)


def look_at_structure(options: ModelOptions) -> Model[AnyCheckpoint | Structure]:
    """As :func:`look`, without tokenizers; the published models (:data:`PUBLISHED`) need no
    checkpoint.

    Raises:
        UsageError: see :func:`look`; also parts for a published model, which has no others.
    """
    if options.model not in PUBLISHED:
        return _look(options, tokenized=False)
    if options.parts:
        option = OPTIONS[next(iter(options.parts))]
        raise UsageError(
            f"{option} needs a checkpoint; {options.model} is planned by its structure",
            f"leave out {option}, or give a file or a folder as --model",
        )
    if options.loras:
        raise UsageError(
            f"--lora needs a checkpoint; {options.model} is planned by its structure",
            "leave out --lora: engines with it are as large",
        )
    nets = open_nets(options.controlnets)
    structure = Structure(options.model, options.without_t5, nets)
    for error in check_nets(structure, {part: net.config for part, net in nets.items()}).values():
        raise error
    scheduler = find_scheduler(structure, options.scheduler)
    return _describe(options.model, structure, scheduler, options)


def _look(options: ModelOptions, tokenized: bool) -> Model[AnyCheckpoint]:
    if options.without_t5 and options.t5 is not None:
        raise UsageError("--no-t5 leaves out T5, and --t5 names one", "leave out one of them")
    for lora in options.loras:
        AdapterFile(lora.path)  # refuses what is none, before a model is fetched
    checkpoint, findings = open_model(options), Findings()
    configs = check_parts(checkpoint, _parts(checkpoint), findings)
    notes: list[str] = []
    if tokenized:
        notes = check_tokenizers(checkpoint, _components(checkpoint), configs, findings)
    with findings.part():
        scheduler = find_scheduler(checkpoint, options.scheduler)
    findings.tell()
    mini = options.model == "mini"
    name = options.model if mini else model_name(checkpoint.root)
    merged = merge_loras(checkpoint, options.loras)
    packaged = mini and not options.parts and not options.loras
    return _describe(name, merged, scheduler, options, tuple(notes), packaged)


def open_model(options: ModelOptions) -> OpenedCheckpoint:
    """The files of a model, without LoRAs; nothing in them is checked.

    Raises:
        CheckpointError: no such model, or it cannot be read.
        UsageError: no such part.
    """
    root = resolve_model(options.model)
    given = {**open_parts(options.parts), **open_nets(options.controlnets)}
    return open_checkpoint(root, options.tokenizers, options.without_t5, given)


def _describe(
    name: str,
    checkpoint: _Opened,
    scheduler: SchedulerSource,
    options: ModelOptions,
    notes: tuple[str, ...] = (),
    packaged: bool = False,
) -> Model[_Opened]:
    transformer = checkpoint.config("transformer")
    return Model(
        name,
        checkpoint,
        recognise(transformer, checkpoint.hint, options.variant),
        scheduler,
        SizeLimits.of(transformer),
        notes,
        packaged,
        describe_nets(options.controlnets, checkpoint.given),
    )


def _components(checkpoint: AnyCheckpoint | Structure) -> list[str]:
    nets = [part for part in checkpoint.given if part_kind(part) == CONTROLNET]
    return [
        *(name for name, row in COMPONENTS.items() if checkpoint.has(row.part)),
        *(row.name for part in nets for row in part_rows(part)),
    ]


def _parts(checkpoint: AnyCheckpoint | Structure) -> list[str]:
    return list(dict.fromkeys(component_row(name).part for name in _components(checkpoint)))
