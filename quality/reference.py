"""What a bundle is compared with: another bundle, or its half-precision twin, built here."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sd35_trt.checkpoints.hub import resolve_model
from sd35_trt.checkpoints.identity import difference
from sd35_trt.checkpoints.look import open_model
from sd35_trt.checkpoints.merged import merge_loras
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.scheduler import FOLDER as SCHEDULER
from sd35_trt.checkpoints.scheduler import write_scheduler
from sd35_trt.errors import BundleError, CheckpointError, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.calibration import DESCRIPTION, CalibrationExtract
from sd35_trt.progress import Progress
from sd35_trt.store.cache import REFERENCES, WORK_PREFIX, StageCache, open_cache
from sd35_trt.store.replacement import write_directory
from sd35_trt.store.working import working_directory

#: The name that stands for the half-precision twin.
HALF = "half"


@dataclass(frozen=True)
class Common:
    """What two bundles both accept: images at a time, inclusive, and a size (width, height)."""

    batch: tuple[int, int]
    size: tuple[int, int]


@contextlib.contextmanager
def open_reference(
    candidate: Bundle,
    against: str,
    source: ModelOptions | None,
    cache_dir: Path | None,
    progress: Progress,
) -> Iterator[Bundle]:
    """The reference for the time of the comparison.

    Args:
        against: ``half``, or a bundle's directory.
        source: the checkpoint behind the candidate; None looks whether it is mini. Its scheduler
            and variant are the candidate's.

    Raises:
        BundleError: no bundle there, or the checkpoint is not the candidate's.
        Sd35Error: the twin cannot be built.
    """
    if against != HALF:
        if source is not None:
            raise UsageError(
                f"--against {against} needs no checkpoint", f"leave out {source.model_words}"
            )
        yield Bundle.open(against, verify=True)
        return
    cache = open_cache(cache_dir)
    check_checkpoint(candidate, source, cache)
    from sd35_trt.build import BuildOptions, build

    m = candidate.manifest
    # Every component, the tokenizers and the bundle itself.
    stages = dict.fromkeys([*_components(candidate), "tokenizers", "bundle"], 0.0)

    def report(stage: str, done: float, total: float, note: str = "", /) -> None:
        stages[stage] = done / total
        progress("building", int(100 * sum(stages.values()) / len(stages)), 100)

    with working_directory(cache.root / REFERENCES, WORK_PREFIX) as folder:
        scheduler = write_scheduler(folder, m.scheduler)
        calibration = None
        if m.calibration is not None:
            # For the range guard: FP32 in the same places.
            calibration = folder / "calibration"
            made_with = CalibrationExtract.of(candidate).calibration
            write_directory(calibration, DESCRIPTION, made_with.files())
        options = BuildOptions(
            **candidate_model(candidate, source, scheduler).model_fields(),
            target=m.target,
            policy=HALF,
            builder=m.builder,
            out=folder / HALF,
            guidance=m.guided,
            batch=m.ranges.batch,
            size=m.ranges.size,
            size_step=m.ranges.size_step,
            cache_dir=cache.root,
            calibration=calibration,
            adapters=max(m.adapter_ranks, default=None),
            inpainting=m.features.inpainting,
            skip_layer_guidance=m.features.skip_layer_guidance,
            command=f"sd35-trt verify {candidate.root} --against {HALF}",
        )
        twin = build(options, report)
        try:
            yield Bundle.open(twin)
        finally:
            with cache.relinked(twin):
                shutil.rmtree(twin, ignore_errors=True)


def candidate_model(
    candidate: Bundle, source: ModelOptions | None, scheduler: Path | None = None
) -> ModelOptions:
    """The checkpoint behind a bundle, with the variant and the parts that it was built with.

    Args:
        source: the checkpoint; None is mini.
        scheduler: the candidate's, in a file; None takes the checkpoint's.
    """
    return replace(
        source or ModelOptions(),
        scheduler=scheduler,
        variant=candidate.manifest.model.variant,
        without_t5="t5" not in _components(candidate),
    )


def check_checkpoint(candidate: Bundle, source: ModelOptions | None, cache: StageCache) -> None:
    """Refuse a checkpoint whose files are not those that the candidate was made from.

    The scheduler may be another: its peer is given the candidate's.

    Args:
        source: the checkpoint; None looks whether the candidate was made from mini.

    Raises:
        BundleError: names the file that differs.
        CheckpointError: there is no such model, or the hub cannot be reached.
    """
    options = candidate_model(candidate, source)
    resolve_model(options.model)  # a model that cannot be had is no other one
    try:
        checkpoint = merge_loras(open_model(options), options.loras)
        reason = difference(checkpoint, _model_files(candidate), cache)
    except CheckpointError as error:
        reason = str(error).partition(" — ")[0]
    if reason is not None:
        raise BundleError(
            f"{candidate.root} was not made from "
            f"{options.model if source else 'the packaged mini'} ({reason})",
            _named(candidate),
        )


def _named(candidate: Bundle) -> str:
    """How the checkpoint behind a bundle is named."""
    loras = candidate.manifest.model.loras
    words = ["--model DIR", *(f"--lora {lora.name}:{lora.scale:.12g}" for lora in loras)]
    words += [f"--controlnet {net.name}=DIR:{net.kind}" for net in candidate.manifest.controls]
    return f"name its checkpoint with {' '.join(words)}, or compare with --against BUNDLE"


def check_comparable(reference: Bundle, candidate: Bundle) -> Common:
    """Refuse two bundles that do not draw the same pictures.

    Raises:
        BundleError: names what differs.
    """
    a, b = reference.manifest, candidate.manifest
    pair = f"{candidate.root} and {reference.root}"
    if a.model.variant != b.model.variant:
        raise BundleError(
            f"{pair} are of different models: {b.model.variant} and {a.model.variant}",
            "compare bundles of one checkpoint",
        )
    files, others = _model_files(reference), _model_files(candidate)
    for name in sorted(files.keys() | others.keys()):
        if files.get(name) != others.get(name):
            raise BundleError(
                f"{pair} are of different checkpoints ({name} differs)",
                "compare bundles of one checkpoint",
            )
    for what, one, other in (
        ("guidance in the graph", a.guided, b.guided),
        ("scheduler", a.scheduler, b.scheduler),
        ("text lengths", _lengths(reference), _lengths(candidate)),
        ("components", _components(reference), _components(candidate)),
    ):
        if one != other:
            raise BundleError(
                f"{pair} differ in {what}: {other} and {one}", "build both with the same options"
            )
    batch = (
        max(a.ranges.batch[0], b.ranges.batch[0]),
        min(a.ranges.batch[1], b.ranges.batch[1]),
    )
    if batch[0] > batch[1]:
        raise BundleError(
            f"{pair} accept no common batch: {_range(b.ranges.batch)} and {_range(a.ranges.batch)}",
            "build both with the same --batch",
        )
    size = b.defaults.size
    low, high = a.ranges.size
    if any(not low <= side <= high or side % a.ranges.size_step for side in size):
        raise BundleError(
            f"{reference.root} does not draw {size[0]}x{size[1]}, the size of {candidate.root}",
            "build both with the same --size",
        )
    return Common(batch, size)


def _model_files(bundle: Bundle) -> dict[str, str]:
    """SHA-256 by name of what engines are made from; the scheduler is compared by its values."""
    files = bundle.manifest.model.files
    return {k: v for k, v in files.items() if not k.startswith(f"{SCHEDULER}/")}


def _range(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]} to {bounds[1]}"


def _lengths(bundle: Bundle) -> dict[str, int]:
    m = bundle.manifest
    lengths = {name: t.length for name, t in m.tokenizers.items()}
    return {**lengths, "t5": m.defaults.t5_tokens}


def _components(bundle: Bundle) -> list[str]:
    return sorted(c.name for c in bundle.manifest.components)
