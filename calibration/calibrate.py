"""From a checkpoint, a policy and prompts to a calibration."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt import __version__
from sd35_trt.components import COMPONENTS, LATENT_SCALE
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.calibration import DESCRIPTION
from sd35_trt.policies import load_policy
from sd35_trt.store.cache import StageCache, default_cache_dir
from sd35_trt.store.hub import resolve_model
from sd35_trt.store.staging import check_destination
from sd35_trt.variants import recognise

if TYPE_CHECKING:
    from sd35_trt.formats.calibration import Calibration

    from .run import DrawingSettings
    from .sensitivity import Sensitivity

#: Libraries whose version a calibration records.
_VERSIONED = ("torch", "diffusers", "transformers", "nvidia-modelopt")

#: About how many pixels are drawn at once where no batch is given.
_PIXELS = 512 * 512


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``sd35-trt calibrate`` takes.

    Attributes:
        model: ``mini``, a diffusers directory, a file in the original layout, or a hub id.
        tokenizers: for a file; see :class:`sd35_trt.build.run.BuildOptions`.
        policy: name or path.
        prompts: a prompt file; None takes the packaged one (mini has its own).
        limit: draw this many prompts, evenly chosen from the set; None draws all.
        steps, guidance: None takes the model's.
        sizes: (width, height) in pixels; empty takes the model's.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None is ``fp32`` on the CPU, else ``bf16``.
        batch: prompts drawn at once; None draws about 512×512 pixels at once.
        out: the calibration's directory.
        command: recorded as the command that made it.
    """

    model: str = "mini"
    tokenizers: Path | None = None
    policy: str = "fp8"
    prompts: Path | None = None
    limit: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    batch: int | None = None
    out: Path = Path("calibration")
    command: str = ""


def calibrate(
    options: CalibrateOptions, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Calibration:
    """Make a calibration and write it to ``options.out``.

    A policy without FP8 gives one that holds ranges alone, for the range guard.

    Raises:
        Sd35Error: explained in one line; nothing half-written stands at ``out``.
    """
    policy = load_policy(options.policy)
    check_destination(options.out, DESCRIPTION, "calibration")
    settings, provenance = prepare(options)
    provenance["policy"] = {"name": policy.name, "sha256": policy.digest()}
    from .run import calibrate as run

    return run(settings, policy, provenance, options.out, progress)


#: Prompts that a sensitivity analysis draws where no limit is given.
SENSITIVITY_PROMPTS = 8


def analyse_sensitivity(
    options: CalibrateOptions,
    budget: int | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Sensitivity, list[str]]:
    """Measure how much each group of the MMDiT's linears suffers from FP8; write it to ``out``.

    Args:
        options: ``policy`` is what the groups are compared with, and gives the written policy its
            rules for the other components.
        budget: bytes of all the MMDiT's linears; with it, a policy is written.

    Returns:
        The figures, and notes for the user.

    Raises:
        Sd35Error: explained in one line; nothing half-written stands at ``options.out``.
    """
    policy = load_policy(options.policy)
    check_destination(options.out, "sensitivity.json", "sensitivity analysis")
    if options.limit is None:
        options = replace(options, limit=SENSITIVITY_PROMPTS)
    settings, provenance = prepare(options)
    provenance["policy"] = {"name": policy.name, "sha256": policy.digest()}
    from .sensitivity import measure, plot, write

    result = measure(settings, policy, budget, progress)
    drawable = importlib.util.find_spec("matplotlib") is not None
    write(result, policy, provenance, options.out, plot if drawable else None)
    return result, [] if drawable else ["no plot — for one: pip install 'sd35-trt[report]'"]


def prepare(options: CalibrateOptions) -> tuple[DrawingSettings, dict[str, Any]]:
    """How to draw, and the provenance of what comes of it, without the policy.

    Raises:
        CheckpointError: not a usable checkpoint.
        UsageError: an option that does not fit.
    """
    try:
        from sd35_trt.checkpoints.diffusers import Checkpoint
        from sd35_trt.checkpoints.single_file import open_checkpoint

        from .prompts import digest, packaged_prompts, read_prompts
        from .run import DrawingSettings, check_device
    except ImportError as error:
        raise Sd35Error(
            f"calibrating needs {error.name or error}", "pip install 'sd35-trt[build]'"
        ) from error
    root = resolve_model(options.model)
    checkpoint = open_checkpoint(root, options.tokenizers)
    config = checkpoint.config("transformer")
    variant = recognise(config, checkpoint.hint)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    elif variant.name == "mini":
        from sd35_trt.mini import calibration_prompts_path

        prompts = read_prompts(calibration_prompts_path())
    else:
        prompts = read_prompts(packaged_prompts())
    if options.limit is not None and options.limit < len(prompts):
        prompts = [prompts[i * len(prompts) // options.limit] for i in range(options.limit)]
    sizes = options.sizes or (variant.size,)
    _check_sizes(sizes, config)
    check_device(options.device)
    batch = options.batch or max(1, _PIXELS // max(w * h for w, h in sizes))
    parts = [p for p in dict.fromkeys(r.part for r in COMPONENTS.values()) if checkpoint.has(p)]
    weights = [path.name for part in parts for path in checkpoint.weights(part).files]
    settings = DrawingSettings(
        root=root,
        source=None if isinstance(checkpoint, Checkpoint) else checkpoint,
        parts=tuple(parts),
        prompts=tuple(prompts),
        steps=variant.steps if options.steps is None else options.steps,
        guidance=variant.guidance if options.guidance is None else options.guidance,
        sizes=tuple(sizes),
        seed=options.seed,
        device=options.device,
        dtype=options.dtype or ("fp32" if options.device == "cpu" else "bf16"),
        batch=min(batch, len(prompts)),
        file_variant="fp16" if any(".fp16." in name for name in weights) else None,
    )
    settings.batches()  # refuses more sizes than prompts
    cache = StageCache(default_cache_dir())
    files = {
        f"{part}/{path.name}": cache.file_hash(path)
        for part in parts
        if checkpoint.config(part)
        for path in checkpoint.files(part)
    }
    versions = {package: importlib.metadata.version(package) for package in _VERSIONED}
    return settings, {
        "variant": variant.name,
        "files": files,
        "prompts": {"sha256": digest(prompts), "count": len(prompts)},
        "steps": settings.steps,
        "guidance": settings.guidance,
        "sizes": [list(size) for size in settings.sizes],
        "seed": settings.seed,
        "method": "max",
        "dtype": settings.dtype,
        "device": settings.device,
        "versions": {"python": platform.python_version(), "sd35-trt": __version__, **versions},
        "command": options.command,
    }


def _check_sizes(sizes: tuple[tuple[int, int], ...], config: dict[str, Any]) -> None:
    patch = LATENT_SCALE * int(config.get("patch_size", 2))
    largest = int(config.get("pos_embed_max_size", 96)) * patch
    for width, height in sizes:
        if any(side % patch or not patch <= side <= largest for side in (width, height)):
            raise UsageError(
                f"--size {width}x{height} is not within {patch}:{largest} in steps of {patch}",
                "choose both sides among those",
            )
