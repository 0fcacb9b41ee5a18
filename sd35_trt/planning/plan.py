"""Whether a model fits a GPU and how, before anything is built.

Weights follow the policy layer by layer. Activations are estimated, see
:mod:`sd35_trt.export.sizes`, or asked of the compiler, see
:mod:`sd35_trt.planning.working_memory`. Loading is estimated from the bus of the GPU and a disk, at
rates that copies reach in practice.

Activations are those of engines whose largest shapes are the ones asked for. An engine for a wider
range takes what its own largest shapes need, unless the runtime sizes its memory for the shapes at
hand; its manifest holds the former.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.backends import BACKENDS, Backend
from sd35_trt.components import COMPONENTS, LATENT_SCALE
from sd35_trt.dimensions import MAX_STEPS_AT_ONCE, Bounds
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.policies import Policy, load_policy
from sd35_trt.residency import (
    LOADED,
    RESIDENT,
    STAGES,
    STREAM_BUFFERS,
    STREAMED,
    Engine,
    Residency,
    plan_residency,
)
from sd35_trt.store.cache import StageCache, default_cache_dir
from sd35_trt.store.hub import model_name, resolve_model
from sd35_trt.store.stages import Progress
from sd35_trt.targets import Target, choose_builder, find_target
from sd35_trt.units import format_bytes, format_memory
from sd35_trt.variants import Variant, recognise

from .working_memory import check_exact, compiled_activations

if TYPE_CHECKING:
    from sd35_trt.checkpoints.single_file import AnyCheckpoint
    from sd35_trt.checkpoints.structure import Structure
    from sd35_trt.export.component import ExportOptions
    from sd35_trt.export.sizes import Sizes

#: Bytes/s of an NVMe disk, reading large files.
DISK_BANDWIDTH = 2e9

#: Share of the bus's peak that copies from pinned memory reach.
BUS_EFFICIENCY = 0.8


@dataclass(frozen=True)
class PlanOptions:
    """What ``sd35-trt plan`` takes.

    Attributes:
        model: ``large``, ``large-turbo``, ``medium`` (no checkpoint needed), ``mini``, a diffusers
            directory, a file in the original layout, or a hub id.
        target: see :func:`sd35_trt.targets.find_target`.
        policy: name or path; None takes the target's default.
        vram: bytes of device memory to stay within; None takes the target's.
        size: width and height in pixels; None takes the model's native size.
        batch: pictures at once.
        guidance: whether both branches are computed; None asks the model variant.
        exact: ask TensorRT for RTX for the activations, which takes a minute or two the first time.
        cache_dir: where its answers are kept; None takes the build's.
    """

    model: str = "mini"
    target: str = "cpu"
    policy: str | None = None
    vram: int | None = None
    size: tuple[int, int] | None = None
    batch: int = 1
    guidance: bool | None = None
    exact: bool = False
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A plan, and what it rests on.

    Attributes:
        components: sizes by component.
        residency: what stays, loads and streams.
        budget: bytes of device memory; None where there is no limit.
        least_bytes: the peak when as little as possible stays.
    """

    model: str
    variant: str
    target: Target
    policy: str
    size: tuple[int, int]
    batch: int
    steps: int
    guided: bool
    components: Mapping[str, Sizes]
    residency: Residency
    budget: int | None
    least_bytes: int

    @property
    def exact(self) -> bool:
        """Whether activations are what the compiler reports."""
        return all(sizes.compiled is not None for sizes in self.components.values())

    @property
    def bus_bandwidth(self) -> float | None:
        """Bytes/s at which weights come from the host; None for the CPU or a family."""
        peak = self.target.bus_bandwidth
        return None if peak is None else BUS_EFFICIENCY * peak

    @property
    def verdict(self) -> str:
        """One line: whether it fits, and how."""
        if self.budget is None:
            whole = format_bytes(self.residency.peak_bytes)
            return f"everything resident takes {whole}; at least {format_bytes(self.least_bytes)}"
        question = f"fits in {format_memory(self.budget)}"
        if not self.residency.fits:
            backend = _backend(self.target)
            streams = any(map(backend.can_stream, self.components))
            streaming = "" if streams else f" ({backend.name} cannot stream weights)"
            return f"{question}: no, it takes at least {format_bytes(self.least_bytes)}{streaming}"
        kinds: dict[str, list[str]] = {RESIDENT: [], LOADED: [], STREAMED: []}
        for name, placement in self.residency.placements.items():
            kinds[placement.kind].append(name)
        if len(kinds[RESIDENT]) == len(self.components):
            return f"{question}: yes, with everything resident"
        how = [f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names]
        asked = kinds[STREAMED] and _backend(self.target).streams == "asked"
        advice = " (build with --weight-streaming)" if asked else ""
        return f"{question}: yes, with {'; '.join(how)}{advice}"

    @property
    def stage_peaks(self) -> dict[str, int]:
        """Device memory of each stage at its fullest."""
        placements = self.residency.placements
        return {
            stage: max(placements[n].peak_bytes for n in names if n in placements)
            for stage, names in STAGES.items()
            if any(n in placements for n in names)
        }

    def seconds_from_disk(self, weight_bytes: int) -> float:
        """To bring weights from disk to where they are used."""
        rates = [DISK_BANDWIDTH]
        if self.bus_bandwidth is not None:
            rates.append(self.bus_bandwidth)
        return weight_bytes / min(rates)

    def seconds_from_host(self, weight_bytes: int) -> float | None:
        """To bring weights from the host's memory into the device's."""
        return None if self.bus_bandwidth is None else weight_bytes / self.bus_bandwidth

    def as_dict(self) -> dict[str, Any]:
        """JSON-serializable; sizes in bytes, times in seconds."""
        result = self.residency
        weights = sum(sizes.weights for sizes in self.components.values())
        stage_of = {name: stage for stage, names in STAGES.items() for name in names}
        return {
            "model": self.model,
            "variant": self.variant,
            "target": self.target.name,
            "policy": self.policy,
            "size": list(self.size),
            "batch": self.batch,
            "steps": self.steps,
            "guided": self.guided,
            "exact": self.exact,
            "budget_bytes": self.budget,
            "fits": None if self.budget is None else result.fits,
            "verdict": self.verdict,
            "peak_bytes": result.peak_bytes,
            "least_bytes": self.least_bytes,
            "weight_bytes": weights,
            "resident_bytes": result.resident_bytes,
            "bus_bytes_per_image": result.bus_bytes,
            "first_load_seconds": self.seconds_from_disk(weights),
            "load_seconds_per_image": self.seconds_from_host(result.bus_bytes),
            "assumed": {
                "cuda_context_bytes": 0
                if self.target.name == "cpu"
                else _backend(self.target).context_bytes,
                "disk_bandwidth": DISK_BANDWIDTH,
                "bus_efficiency": BUS_EFFICIENCY,
            },
            "components": [
                {
                    "name": name,
                    "stage": stage_of[name],
                    "weight_bytes": sizes.weights,
                    "activation_bytes": _activation_bytes(sizes, self.target),
                    **asdict(result.placements[name]),
                    "disk_seconds": self.seconds_from_disk(sizes.weights),
                    "bus_seconds": self.seconds_from_host(sizes.weights),
                }
                for name, sizes in self.components.items()
            ],
            "stages": [
                {"name": stage, "peak_bytes": peak} for stage, peak in self.stage_peaks.items()
            ],
        }


def plan(options: PlanOptions, progress: Progress = lambda *_: None) -> Plan:
    """Plan a model on a target.

    Args:
        progress: of asking the compiler, by component.

    Raises:
        Sd35Error: explained in one line.
    """
    target = find_target(options.target)
    policy = load_policy(options.policy or target.policy)
    target.check(policy)
    if options.exact:
        check_exact(target)
    try:
        source = _source(options.model)
        transformer = source.config("transformer")
        variant = recognise(transformer, source.hint)
        guided = variant.guidance != 1.0 if options.guidance is None else options.guidance
        size = options.size or variant.size
        _check_size(size, transformer)
        if options.batch < 1:
            raise UsageError(f"--batch {options.batch} draws nothing", "use 1 or more")
        sizes = measure(source, policy, variant, size, options.batch, guided)
        if options.exact:
            cache = StageCache(options.cache_dir or default_cache_dir())
            for name, asked, dims in _requests(source, variant, size, options.batch, guided):
                bounds = _bounds(dims, guided)
                found = compiled_activations(
                    name, source, policy, asked, bounds, target, cache, progress
                )
                sizes[name] = replace(sizes[name], compiled=found)
    except ImportError as error:
        raise Sd35Error(f"planning needs {error.name}", "pip install 'sd35-trt[build]'") from error
    budget = target.memory_bytes if options.vram is None else options.vram
    result, least = _residency(sizes, variant.steps, target, budget)
    return Plan(
        model=model_name(options.model, source.root),
        variant=variant.name,
        target=target,
        policy=policy.name,
        size=size,
        batch=options.batch,
        steps=variant.steps,
        guided=guided,
        components=sizes,
        residency=result,
        budget=budget,
        least_bytes=least,
    )


def replan(planned: Plan, target: Target, vram: int | None = None) -> Plan:
    """The same model and policy on another GPU; nothing is measured again.

    What the compiler reported counts for the GPUs that it compiled for; for others, the estimate.

    Args:
        vram: bytes of device memory to stay within; None takes the target's.
    """
    budget = target.memory_bytes if vram is None else vram
    sizes = dict(planned.components)
    if target.builders != planned.target.builders:
        sizes = {name: replace(found, compiled=None) for name, found in sizes.items()}
    result, least = _residency(sizes, planned.steps, target, budget)
    return replace(
        planned,
        target=target,
        components=sizes,
        residency=result,
        budget=budget,
        least_bytes=least,
    )


def _backend(target: Target) -> Backend:
    return BACKENDS[choose_builder(target)]


def _activation_bytes(sizes: Sizes, target: Target) -> int:
    """An engine's working memory: the compiler's figure, or the estimate."""
    if sizes.compiled is not None:
        return sizes.compiled
    backend = _backend(target)
    return sizes.working(backend.allocation) + backend.workspace_bytes


def _working_bytes(sizes: Sizes, target: Target) -> int:
    """What an engine takes beside its weights, its inputs and outputs included."""
    # The estimate has them already.
    return _activation_bytes(sizes, target) + (0 if sizes.compiled is None else sizes.ports)


def _residency(
    sizes: Mapping[str, Sizes], steps: int, target: Target, budget: int | None
) -> tuple[Residency, int]:
    """The plan within a budget, and the lowest peak that there is."""
    backend = _backend(target)
    engines = [
        Engine(
            name,
            stage,
            sizes[name].weights,
            _working_bytes(sizes[name], target),
            steps if name == "denoiser" else 1,
            min(STREAM_BUFFERS * sizes[name].largest_layer, sizes[name].weights)
            if backend.can_stream(name)
            else None,
            name in backend.keeps_activations,
        )
        for stage, names in STAGES.items()
        for name in names
        if name in sizes
    ]
    reserve = 0 if target.name == "cpu" else backend.context_bytes
    least = plan_residency(engines, 0, reserve).peak_bytes
    return plan_residency(engines, budget, reserve), least


def measure(
    source: AnyCheckpoint | Structure,
    policy: Policy,
    variant: Variant,
    size: tuple[int, int],
    batch: int,
    guided: bool,
) -> dict[str, Sizes]:
    """Sizes of every component of a model, by name.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
        UsageError: the policy does not fit the model.
    """
    from sd35_trt.export.sizes import component_sizes

    return {
        name: component_sizes(name, source, policy, options, dims)
        for name, options, dims in _requests(source, variant, size, batch, guided)
    }


def _requests(
    source: AnyCheckpoint | Structure,
    variant: Variant,
    size: tuple[int, int],
    batch: int,
    guided: bool,
) -> Iterator[tuple[str, ExportOptions, dict[str, int]]]:
    """Every component of a model, and the shapes that it is asked for."""
    from sd35_trt.export.component import ExportOptions

    clip_tokens, t5_tokens = _text_lengths(source)
    texts = 2 * batch if guided else batch
    width, height = size
    common = {
        "samples": texts,
        "steps": min(variant.steps, MAX_STEPS_AT_ONCE),
        "height": height // LATENT_SCALE,
        "width": width // LATENT_SCALE,
        "image_height": height,
        "image_width": width,
    }
    for name in (name for names in STAGES.values() for name in names):
        row = COMPONENTS[name]
        if not source.has(row.part):
            continue
        encoder = row.tokenizer is not None
        dims = {
            **common,
            "batch": texts if encoder else batch,
            "tokens": t5_tokens if encoder else clip_tokens + t5_tokens,
        }
        yield name, ExportOptions(clip_tokens, guided), dims


def _bounds(dims: Mapping[str, int], guided: bool) -> dict[str, Bounds]:
    """Of an engine whose usual and largest shapes are these, but for the batch.

    Like a build's, it takes single pictures, shorter texts and half the size too: with a dimension
    that is fixed it would be another engine.
    """
    texts = 2 if guided else 1
    bounds = {}
    for name, largest in dims.items():
        if name in ("height", "width", "image_height", "image_width"):
            unit = 2 if name in ("height", "width") else 2 * LATENT_SCALE
            low = max(largest // (2 * unit) * unit, unit)
        else:
            low = {"batch": 1, "samples": texts, "steps": 1}.get(name, (largest + 1) // 2)
        usual = low if name in ("batch", "samples") else largest
        bounds[name] = (low, usual, largest)
    return bounds


def _source(model: str) -> AnyCheckpoint | Structure:
    from sd35_trt.checkpoints.single_file import open_checkpoint
    from sd35_trt.checkpoints.structure import PUBLISHED, Structure

    if model in PUBLISHED:
        return Structure(model)
    return open_checkpoint(resolve_model(model))


def _text_lengths(source: AnyCheckpoint | Structure) -> tuple[int, int]:
    """Tokens of CLIP's part of the text and of T5's.

    A single file has no tokenizers: the published ones are as long as the models allow.
    """
    from sd35_trt.checkpoints.diffusers import Checkpoint, read_json
    from sd35_trt.export.tokenizers import T5_TOKENS

    clip = int(source.config("text_encoder").get("max_position_embeddings", 77))
    if not isinstance(source, Checkpoint):
        return clip, T5_TOKENS
    limits = []
    for name, most in (("clip_l", clip), ("t5", T5_TOKENS)):
        row = COMPONENTS[name]
        if source.has(row.part):
            data = read_json(source.root / str(row.tokenizer) / "tokenizer_config.json")
            most = int(min(most, data.get("model_max_length", most)))
        limits.append(most)
    return limits[0], limits[1]


def _check_size(size: tuple[int, int], transformer: Mapping[str, Any]) -> None:
    unit = LATENT_SCALE * int(transformer.get("patch_size", 2))
    largest = int(transformer.get("pos_embed_max_size", 96)) * unit
    if any(side % unit or not unit <= side <= largest for side in size):
        raise UsageError(
            f"--size {size[0]}x{size[1]} is not in steps of {unit} from {unit} to {largest}",
            "use for example --size 1024x1024" if largest >= 1024 else f"use {largest}x{largest}",
        )
