"""From a checkpoint to a bundle."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.components import COMPONENTS, LATENT_SCALE
from sd35_trt.dimensions import Bounds, Ranges, dimension_bounds
from sd35_trt.errors import CheckpointError, Sd35Error, UsageError
from sd35_trt.export.provenance import tool_versions
from sd35_trt.formats.bundle import MANIFEST
from sd35_trt.formats.calibration import Calibration
from sd35_trt.policies import Policy, load_policy
from sd35_trt.store.cache import StageCache, default_cache_dir
from sd35_trt.store.hub import model_name, resolve_model
from sd35_trt.store.stages import Progress, Stage, run_stage
from sd35_trt.store.staging import check_destination
from sd35_trt.targets import choose_builder, find_target
from sd35_trt.variants import Variant, recognise

if TYPE_CHECKING:
    from sd35_trt.checkpoints.single_file import AnyCheckpoint
    from sd35_trt.engines.builder import Builder, CompiledComponent, ExportedComponent


@dataclass(frozen=True)
class BuildOptions:
    """What ``sd35-trt build`` takes.

    Attributes:
        model: ``mini``, a diffusers directory, a file in the original layout, or a hub id.
        tokenizers: a directory with the tokenizers' folders, for a model in a file; None looks
            beside it, then on the hub.
        target: a GPU family, a product, ``cpu`` or ``auto``; see :func:`sd35_trt.targets.targets`.
        policy: name or path; None takes the target's default.
        calibration: what ``sd35-trt calibrate`` wrote: scales for FP8, ranges for the guard. None
            takes the packaged one for ``mini``, or the input scales of an FP8 file, where the
            policy needs scales.
        out: the bundle's directory; None makes ``bundles/<model>-<target>``.
        guidance: whether the denoiser computes both branches; None asks the model variant.
        batch: inclusive range of images per run; None is 1 to 4.
        size: inclusive range of width and height in pixels; None is half to one and a half times
            the model's native size.
        size_step: sizes are multiples of this many pixels.
        builder: one of those that serve the target; None takes the preferred one.
        weight_streaming: engines that can keep part of their weights in the host's memory.
        refit: engines whose weights can be exchanged.
        autotune: try more kernels, with the ``inductor`` builder.
        cache_dir: where stages are kept.
        command: recorded as the command that made the bundle.
    """

    model: str = "mini"
    tokenizers: Path | None = None
    target: str = "cpu"
    policy: str | None = None
    calibration: Path | None = None
    out: Path | None = None
    guidance: bool | None = None
    batch: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    size_step: int = 64
    builder: str | None = None
    weight_streaming: bool = False
    refit: bool = False
    autotune: bool = False
    cache_dir: Path | None = None
    command: str = ""


def build(options: BuildOptions, progress: Progress = lambda *_: None) -> Path:
    """Build a bundle.

    Returns:
        The bundle's directory.

    Raises:
        Sd35Error: explained in one line; nothing half-written is left.
    """
    target = find_target(options.target)
    policy = load_policy(options.policy or target.policy)
    target.check(policy)
    chosen = choose_builder(target, options.builder)
    root = resolve_model(options.model)
    name = model_name(options.model, root)
    out = options.out or Path("bundles") / f"{name}-{target.name}"
    cache = StageCache(options.cache_dir or default_cache_dir())
    try:
        from sd35_trt.checkpoints.single_file import open_checkpoint
        from sd35_trt.engines.assemble import assemble
        from sd35_trt.engines.builder import EngineOptions, ExportedComponent, load_builder
        from sd35_trt.planning.working_memory import estimated_memory

        engine_options = EngineOptions(options.weight_streaming, options.refit, options.autotune)
        builder = load_builder(chosen, target.builders[chosen], engine_options)
        check_destination(out, MANIFEST, "bundle")
        checkpoint = open_checkpoint(root, options.tokenizers)
        versions = tool_versions()
        transformer = checkpoint.config("transformer")
        variant = recognise(transformer, checkpoint.hint)
        guided = variant.guidance != 1.0 if options.guidance is None else options.guidance
        ranges = _ranges(options, variant, transformer)
        facts: dict[str, Any] = {
            "model": {"name": name, "variant": variant.name},
            "target": target.name,
            "builder": chosen,
            "engine_options": builder.describe(),
            "policy": policy.as_dict(),
            "latent_channels": _dimension(transformer, "in_channels"),
            "latent_scale": LATENT_SCALE,
            "guided": guided,
            "scheduler": _scheduler(checkpoint.config("scheduler")),
            "versions": {**versions, **builder.versions()},
            "command": options.command,
        }
        names = [n for n, row in COMPONENTS.items() if checkpoint.has(row.part)]
        inputs = _StageInputs(checkpoint, cache, versions)
        calibration = _calibration(options, policy, names, inputs)
        for part in dict.fromkeys(COMPONENTS[n].part for n in names):
            checkpoint.weights(part)  # a missing or truncated file fails here, before any work
        tokenizers = run_stage(cache, _tokenizer_stage(inputs, names), progress)
        lengths = json.loads((tokenizers / "tokenizers.json").read_text("utf-8"))
        clip_tokens = lengths["clip_l"]["length"]
        t5_tokens = lengths["t5"]["length"] if "t5" in lengths else _T5_TOKENS
        stages = [
            _component_stage(
                inputs, n, policy, clip_tokens, guided, calibration, builder.backend.dialect
            )
            for n in names
        ]
        if calibration and not all(cache.find(s.name, s.key) for s in stages):
            _check_calibration(calibration, checkpoint, names, policy, stages)
        folders = {stage.name: run_stage(cache, stage, progress) for stage in stages}
        facts["model"]["files"] = _files(stages)
        facts["ranges"] = Ranges(*ranges, t5_tokens=(min(77, t5_tokens), max(512, t5_tokens)))
        facts["defaults"] = {
            "steps": variant.steps,
            "guidance": variant.guidance if guided else 1.0,
            "size": [min(max(s, ranges[1][0]), ranges[1][1]) for s in variant.size],
            "sampler": "euler",
            "t5_tokens": t5_tokens,
        }
        engines = []
        for name, folder in folders.items():
            bounds = dimension_bounds(name, facts["ranges"], facts["defaults"], clip_tokens, guided)
            component = ExportedComponent.read(folder)
            engine = _engine(builder, component, bounds, cache, progress)
            if not builder.backend.reports_memory:
                largest = {dim: bound[2] for dim, bound in engine.bounds.items()}
                estimate = estimated_memory(
                    name, chosen, checkpoint, policy, clip_tokens, guided, largest, cache
                )
                engine = replace(engine, **asdict(estimate))
            engines.append(engine)
        assemble(out, builder, engines, tokenizers, lengths, facts, calibration)
        progress("bundle", 1.0, "written")
    except ImportError as error:
        raise Sd35Error(f"building needs {error.name}", "pip install 'sd35-trt[build]'") from error
    except OSError as error:
        free = shutil.disk_usage(_existing_parent(out)).free
        raise Sd35Error(
            f"cannot write {error.filename or out}: {error.strerror or error} "
            f"({free / 1e9:.1f} GB free there)",
            "free space, or choose another --out and --cache-dir",
        ) from error
    return out


def _engine(
    builder: Builder,
    component: ExportedComponent,
    bounds: Mapping[str, Bounds],
    cache: StageCache,
    progress: Progress,
) -> CompiledComponent:
    """Compile a component, where its builder does that before loading."""
    from sd35_trt.engines.builder import CompiledComponent

    used = {d: bounds[d] for port in component.inputs for d in port.dynamic}
    stage = builder.stage(component, used)
    folder = run_stage(cache, stage, progress) if stage else component.folder
    return CompiledComponent(component, folder, used)


def _calibration(
    options: BuildOptions, policy: Policy, names: Iterable[str], inputs: _StageInputs
) -> Calibration | None:
    """The calibration to build with.

    Raises:
        CheckpointError: the checkpoint has input scales for a part of what the policy quantizes.
        UsageError: the policy needs one and none was given, or it cannot be read.
    """
    if options.calibration is not None:
        return Calibration.load(options.calibration)
    if not any(r.precision == "fp8" and fnmatch.filter(names, r.component) for r in policy.rules):
        return None
    if options.model == "mini":
        from sd35_trt.mini import calibration_path

        return Calibration.load(calibration_path())
    if stored := _stored_scales(policy, names, inputs):
        return stored
    raise UsageError(
        f"policy {policy.name!r} needs a calibration",
        f"make one with: sd35-trt calibrate --model {options.model} "
        f"--policy {options.policy or policy.name} --out DIR, and give it as --calibration DIR",
    )


def _stored_scales(
    policy: Policy, names: Iterable[str], inputs: _StageInputs
) -> Calibration | None:
    """The input scales that a checkpoint has itself, for all that the policy quantizes.

    None where it has none, or where the policy asks for the operands of attention matmuls.

    Raises:
        CheckpointError: it has a part of them.
    """
    from sd35_trt.export.component import fp8_layers

    linears, attentions = fp8_layers(inputs.checkpoint, names, policy)
    amax = inputs.checkpoint.input_amax(linears)
    if attentions or not amax:
        return None
    parts = dict.fromkeys(COMPONENTS[n].part for n in names)
    provenance = {"method": "the checkpoint's input scales", **inputs.describe(*parts)}
    return Calibration(amax, {}, {}, provenance)


def _check_calibration(
    calibration: Calibration,
    checkpoint: AnyCheckpoint,
    names: Iterable[str],
    policy: Policy,
    stages: Iterable[Stage],
) -> None:
    """Refuse a calibration that is not of this checkpoint and policy.

    A policy without FP8 takes the ranges of any calibration of the checkpoint.
    """
    from sd35_trt.export.component import fp8_layers

    linears, attentions = fp8_layers(checkpoint, names, policy)
    if not linears and not attentions:
        linears = list(calibration.inputs)
        attentions = list(dict.fromkeys(name.rpartition(".")[0] for name in calibration.bmm))
    calibration.check(_files(stages), linears, attentions)


def _files(stages: Iterable[Stage]) -> dict[str, str]:
    """SHA-256 of the checkpoint's files that these stages read, by path."""
    return {k: v for stage in stages for k, v in stage.inputs["files"].items()}


#: diffusers' default ``max_sequence_length``; without T5, its part of the text is this many zeros.
_T5_TOKENS = 256


@dataclass(frozen=True)
class _StageInputs:
    """What the stages share: where they read from, and what identifies it."""

    checkpoint: AnyCheckpoint
    cache: StageCache
    versions: Mapping[str, str]

    def describe(self, *folders: str) -> dict[str, Any]:
        """Versions, and the hashes of the checkpoint's files in these folders."""
        files = {}
        for folder in folders:
            for path in self.checkpoint.files(folder):
                if not path.is_file():
                    raise CheckpointError(f"{path} is missing", "download the checkpoint again")
                files[f"{folder}/{path.name}"] = self.cache.file_hash(path)
        return {"versions": dict(self.versions), "files": files}


def _tokenizer_stage(inputs: _StageInputs, names: list[str]) -> Stage:
    def run(out: Path, progress: Callable[[float, str], None]) -> None:
        from sd35_trt.export.tokenizers import export_tokenizers

        progress(0.0, "converting")
        export_tokenizers(inputs.checkpoint, names, out)

    folders = [row.tokenizer for n in names if (row := COMPONENTS[n]).tokenizer]
    # CLIP's configuration holds the length of its position table.
    configs = {n: inputs.checkpoint.config(COMPONENTS[n].part) for n in ("clip_l", "clip_g")}
    described = {**inputs.describe(*folders), "configs": configs}
    return Stage("tokenizers", described, ("sd35_trt.export.tokenizers",), run)


def _component_stage(
    inputs: _StageInputs,
    name: str,
    policy: Policy,
    clip_tokens: int,
    guided: bool,
    calibration: Calibration | None,
    form: str,
) -> Stage:
    from sd35_trt.export.scales import Scales

    part = COMPONENTS[name].part
    scales = Scales.of(calibration, part) if calibration else None

    def run(out: Path, progress: Callable[[float, str], None]) -> None:
        from sd35_trt.export.component import ExportOptions, export_component
        from sd35_trt.export.graphs import KeptGraphs

        options = ExportOptions(clip_tokens, guided, form)
        graph = {k: v for k, v in described.items() if k not in ("files", "calibration")}
        if scales:
            graph["calibration"] = scales.structure(name)
        graphs = KeptGraphs(inputs.cache, described["config"], graph)
        export_component(name, inputs.checkpoint, policy, options, out, progress, scales, graphs)

    described = {**inputs.describe(part), "form": form}
    # A single file's configuration is not among the files.
    described["config"] = inputs.checkpoint.config(part)
    if scales and (effect := scales.describe(name)):
        described["calibration"] = effect
    # A part's components meet in their dtypes, so that the rules of each count for all of them.
    described["policy"] = policy.digest(n for n, row in COMPONENTS.items() if row.part == part)
    if COMPONENTS[name].tokenizer:
        described["clip_tokens"] = clip_tokens
    if name == "denoiser":
        described["guided"] = guided
    return Stage(name, described, ("sd35_trt.export.component",), run)


def _dimension(config: Mapping[str, Any], key: str) -> int:
    """A whole number of the transformer's configuration.

    Raises:
        CheckpointError: names the key that is missing or no number.
    """
    value = config.get(key)
    if not isinstance(value, int):
        raise CheckpointError(
            f"transformer/config.json has {key} = {value!r}",
            "take the original model's config.json",
        )
    return value


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _ranges(
    options: BuildOptions, variant: Variant, config: Mapping[str, Any]
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Batch range, size range and size step.

    Raises:
        UsageError: a range outside what the model can draw.
    """
    step = options.size_step
    patch = LATENT_SCALE * int(config.get("patch_size", 2))
    if step < patch or step % patch:
        raise UsageError(f"--size-step must be a multiple of {patch}, not {step}", "use 64")
    largest = _dimension(config, "pos_embed_max_size") * patch // step * step
    native = max(variant.size)
    low, high = options.size or (
        max(step, native // 2 // step * step),
        min(native * 3 // 2 // step * step, largest),
    )
    if not (step <= low <= high <= largest) or low % step or high % step:
        raise UsageError(
            f"--size {low}:{high} is not within {step}:{largest} in steps of {step}",
            "choose both bounds among those, or another --size-step",
        )
    batch = options.batch or (1, 4)
    if not 1 <= batch[0] <= batch[1] <= 63:
        raise UsageError(
            f"--batch {batch[0]}:{batch[1]} is not within 1:63", "choose both bounds among those"
        )
    return batch, (low, high), step


_UNUSED_SCHEDULER_OPTIONS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def _scheduler(config: Mapping[str, Any]) -> dict[str, float]:
    """Shift and training timesteps of a ``FlowMatchEulerDiscreteScheduler``.

    Raises:
        CheckpointError: an option that SD3.5 does not use and the runtime does not compute.
    """
    for option in _UNUSED_SCHEDULER_OPTIONS:
        if config.get(option):
            raise CheckpointError(
                f"scheduler_config.json sets {option}, which SD3.5 does not use",
                "take the scheduler of the original model",
            )
    return {
        "shift": float(config.get("shift", 3.0)),
        "num_train_timesteps": float(config.get("num_train_timesteps", 1000)),
    }
