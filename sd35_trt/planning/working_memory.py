"""Working memory of an engine before it is built: estimated, or by asking TensorRT for RTX.

Its builder needs no GPU, and what it reports depends neither on the values of weights nor, but for
the modulation, on blocks beyond a few: a few blocks with made-up weights are compiled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec import Struct

from sd35_trt.backends import BACKENDS
from sd35_trt.checkpoints.controlnets import part_source
from sd35_trt.components import BRANCH_DENOISER, component_row, layer_holder, part_rows
from sd35_trt.dimensions import Bounds
from sd35_trt.engines.builder import Builder, ExportedComponent, load_builder
from sd35_trt.errors import BundleError, UsageError
from sd35_trt.export.provenance import tool_versions
from sd35_trt.features import Features
from sd35_trt.formats.reading import Count, encode, read_document
from sd35_trt.policies import Policy
from sd35_trt.progress import Progress, silent
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage
from sd35_trt.targets import Target

if TYPE_CHECKING:
    from sd35_trt.checkpoints.merged import AnyCheckpoint
    from sd35_trt.checkpoints.structure import Structure
    from sd35_trt.export.component import ExportOptions

#: Of a component's engine, in the cache.
MEMORY_FILE = "memory.json"


class MemoryReporter(Builder, Protocol):
    """A builder that says how much working memory an engine takes, for GPUs that are not there."""

    def working_memory(
        self,
        component: ExportedComponent,
        bounds: Mapping[str, Bounds],
        out: Path,
        progress: Callable[[float, str], None],
    ) -> int:
        """Bytes of a component's engine, which is compiled in a directory and not kept."""


class MemoryFacts(Struct, frozen=True):
    """What ``memory.json`` holds: an engine's working memory, as the bundle's manifest has it."""

    activation_bytes: Count

    def write(self, folder: Path) -> None:
        """Write ``memory.json``."""
        (folder / MEMORY_FILE).write_bytes(encode(self))

    @classmethod
    def read(cls, folder: Path) -> MemoryFacts:
        """Read ``memory.json``.

        Raises:
            BundleError: missing, or not as it was written.
        """
        fix = "delete it: the next build writes it again"
        return read_document(folder / MEMORY_FILE, cls, 1 << 16, BundleError, fix)


def check_exact(target: Target) -> None:
    """Refuse a target whose engines this builder does not make.

    Raises:
        UsageError: names the builder that does.
    """
    backend = BACKENDS[target.builder]
    if not (backend.crosses and backend.reports_memory):
        able = [b.title for b in BACKENDS.values() if b.crosses and b.reports_memory]
        raise UsageError(
            f"--exact asks {' or '.join(able)}, and {target.name}'s engines are {backend.name}'s",
            "leave out --exact",
        )


def compiled_activations(
    name: str,
    source: AnyCheckpoint | Structure,
    policy: Policy,
    options: ExportOptions,
    bounds: Mapping[str, Bounds],
    target: Target,
    cache: StageCache,
    progress: Progress = silent,
) -> int:
    """Bytes that the builder reports for a component's engine, without inputs and outputs.

    They are what a build's manifest calls ``activation_bytes`` when its engine has these bounds:
    memory for the largest shapes, which for small models varies with the usual ones too, as the
    builder optimizes for them. The range guard's FP32 places are not counted: a build takes them
    from a calibration.

    Args:
        name: one that :func:`sd35_trt.components.component_row` knows.
        bounds: of its dynamic dimensions; see :func:`sd35_trt.dimensions.dimension_bounds`.
        target: one that :func:`check_exact` accepts.
        cache: where figures are kept; nothing else of what is compiled is.

    Raises:
        Sd35Error: TensorRT for RTX is not installed, or does not compile the component.
    """
    builder = cast(MemoryReporter, load_builder(target.builder, target.builders[target.builder]))

    def run(out: Path, report: Callable[[float, str], None]) -> None:
        from sd35_trt.export.graphs import GraphCache
        from sd35_trt.export.weightless import export_weightless

        graphs = GraphCache(cache, exported["config"], {**exported, "weightless": True})
        with tempfile.TemporaryDirectory(dir=out) as temporary:
            folder = Path(temporary)
            report(0.0, "tracing")
            left_out = export_weightless(name, source, policy, options, folder, graphs)
            component = ExportedComponent.read(folder)
            reported = builder.working_memory(component, bounds, folder, report)
        MemoryFacts(reported + left_out * _copies(name, options, bounds)).write(out)

    part = component_row(name).part
    exported: dict[str, Any] = {
        "versions": tool_versions(),
        "config": part_source(source, part)[0],
        "policy": policy.digest(row.name for row in part_rows(part)),
        "options": asdict(options),
    }
    inputs = {
        **exported,
        "builder": builder.describe(),
        "versions": {**tool_versions(), **builder.versions()},
        "bounds": dict(bounds),
    }
    code = ("sd35_trt.export.weightless", type(builder).__module__)
    folder = run_stage(cache, Stage(f"{name}-memory", inputs, code, run), progress)
    return MemoryFacts.read(folder).activation_bytes


def estimated_activations(
    name: str,
    builder: str,
    source: AnyCheckpoint | Structure,
    policy: Policy,
    clip_tokens: int,
    guided: bool,
    features: Features,
    dims: Mapping[str, int],
    cache: StageCache,
) -> int:
    """Bytes of working memory of a component whose builder does not say.

    See :mod:`sd35_trt.export.sizes`: inputs and outputs are included.

    Args:
        name: one that :func:`sd35_trt.components.component_row` knows.
        builder: of the engine.
        clip_tokens, guided, features: as of :class:`sd35_trt.export.component.ExportOptions`.
        dims: of its inputs' dynamic dimensions, by name.
        cache: where figures are kept.
    """

    def run(out: Path, report: Callable[[float, str], None]) -> None:
        from sd35_trt.export.component import ExportOptions
        from sd35_trt.export.sizes import component_sizes

        options = ExportOptions(clip_tokens, guided, features=own)
        sizes = component_sizes(name, source, policy, options, dims)
        MemoryFacts(sizes.working(BACKENDS[builder].allocation)).write(out)

    part, own = component_row(name).part, features.of_component(name)
    inputs: dict[str, Any] = {
        "versions": tool_versions(),
        "config": part_source(source, part)[0],
        "policy": policy.digest(row.name for row in part_rows(part)),
        "clip_tokens": clip_tokens,
        "guided": guided,
        "dims": dict(dims),
        "builder": builder,
        **own.describe(),
    }
    code = ("sd35_trt.export.sizes",)
    folder = run_stage(cache, Stage(f"{name}-activations", inputs, code, run), silent)
    return MemoryFacts.read(folder).activation_bytes


def _copies(name: str, options: ExportOptions, bounds: Mapping[str, Bounds]) -> int:
    """How many times an engine holds the modulation: the one thing in it that grows with depth."""
    if name == "conditioner":
        return bounds["samples"][-1] * bounds["steps"][-1]
    # Guidance concatenates that of both branches; without, it is read from the input.
    joined = layer_holder(name) == "denoiser" and name != BRANCH_DENOISER and options.guided
    return 2 * bounds["batch"][-1] if joined else 0
