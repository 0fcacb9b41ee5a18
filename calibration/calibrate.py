"""From a checkpoint, a policy and prompts to a calibration."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace as replace_fields

from sd35_trt import __version__
from sd35_trt.checkpoints.identity import file_hashes
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.compat.requirement import requirement
from sd35_trt.formats.calibration import (
    DESCRIPTION,
    PolicyIdentity,
    PromptsIdentity,
    Provenance,
)
from sd35_trt.policies import load_policy
from sd35_trt.progress import Progress, silent
from sd35_trt.store.cache import StageCache, default_cache_dir
from sd35_trt.store.disk import file_errors
from sd35_trt.store.replacement import check_destination
from sd35_trt.variants import Variant

from .prompts import digest, packaged_prompts, read_prompts

if TYPE_CHECKING:
    from sd35_trt.formats.calibration import Calibration

    from .run import DrawingSettings
    from .sensitivity import Sensitivity

#: Libraries whose version a calibration records.
_VERSIONED = ("torch", "diffusers", "transformers", "nvidia-modelopt")

#: About how many pixels are drawn at once where no batch is given.
_PIXELS = 512 * 512


@dataclass(frozen=True)
class CalibrateOptions(ModelOptions):
    """What ``sd35-trt calibrate`` takes; which model: see :class:`ModelOptions`.

    Attributes:
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


def calibrate(options: CalibrateOptions, progress: Progress = silent) -> Calibration:
    """Make a calibration and write it to ``options.out``.

    A policy without FP8 gives one that holds ranges alone, for the range guard.

    Raises:
        Sd35Error: explained in one line; nothing half-written stands at ``out``.
    """
    policy = load_policy(options.policy)
    check_destination(options.out, DESCRIPTION, "calibration")
    with _file_errors(options):
        settings, provenance = prepare(options)
        identity = PolicyIdentity(policy.name, policy.digest())
        from .run import calibrate as run

        made_for = replace_fields(provenance, policy=identity)
        return run(settings, policy, made_for, options.out, progress)


def _file_errors(options: CalibrateOptions) -> AbstractContextManager[None]:
    advice = "choose another --out; the same command goes on where this one was"
    return file_errors(options.out, advice)


#: Prompts that a sensitivity analysis draws where no limit is given.
SENSITIVITY_PROMPTS = 8


def analyse_sensitivity(
    options: CalibrateOptions,
    budget: int | None = None,
    progress: Progress = silent,
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
    drawable = importlib.util.find_spec("matplotlib") is not None
    with _file_errors(options):
        settings, provenance = prepare(options)
        identity = PolicyIdentity(policy.name, policy.digest())
        from .sensitivity import measure, plot, write

        result = measure(settings, policy, budget, progress)
        made_for = replace_fields(provenance, policy=identity)
        write(result, policy, made_for, options.out, plot if drawable else None)
    return result, [] if drawable else ["no plot — for one: pip install 'sd35-trt[report]'"]


def prepare(options: CalibrateOptions) -> tuple[DrawingSettings, Provenance]:
    """How to draw, and the provenance of what comes of it, without the policy.

    Raises:
        CheckpointError: not a usable checkpoint.
        UsageError: an option that does not fit.
    """
    with requirement("calibrating", "build"):
        from .run import DrawingSettings, check_device
    model = look(options)
    checkpoint, variant = model.checkpoint, model.variant
    prompts = _prompts(options, variant)
    sizes = options.sizes or (variant.size,)
    for size in sizes:
        model.sizes.check(*size)
    check_device(options.device)
    batch = options.batch or max(1, _PIXELS // max(w * h for w, h in sizes))
    settings = DrawingSettings(
        root=checkpoint.root,
        source=checkpoint,
        scheduler=model.scheduler.values,
        parts=tuple(model.parts),
        prompts=tuple(prompts),
        steps=variant.steps if options.steps is None else options.steps,
        guidance=variant.guidance if options.guidance is None else options.guidance,
        sizes=tuple(sizes),
        seed=options.seed,
        device=options.device,
        dtype=options.dtype or ("fp32" if options.device == "cpu" else "bf16"),
        batch=min(batch, len(prompts)),
        nets=model.nets,
    )
    settings.batches()  # refuses more sizes than prompts
    cache = StageCache(default_cache_dir())
    files = file_hashes(checkpoint, model.parts, cache) | model.scheduler.hashes(cache)
    packages = (*_VERSIONED, *model.libraries)
    versions = {package: importlib.metadata.version(package) for package in packages}
    return settings, Provenance(
        variant=variant.name,
        files=files,
        prompts=PromptsIdentity(digest(prompts), len(prompts)),
        steps=settings.steps,
        guidance=settings.guidance,
        sizes=settings.sizes,
        seed=settings.seed,
        method="max",
        dtype=settings.dtype,
        device=settings.device,
        versions={"python": platform.python_version(), "sd35-trt": __version__, **versions},
        command=options.command,
    )


def _prompts(options: CalibrateOptions, variant: Variant) -> list[str]:
    """The prompts to draw.

    Raises:
        UsageError: a prompt file that cannot be read, or holds none.
    """
    if options.prompts is not None:
        path = options.prompts
    elif variant.name == "mini":
        from sd35_trt.mini import calibration_prompts_path

        path = calibration_prompts_path()
    else:
        path = packaged_prompts()
    prompts = read_prompts(path)
    if options.limit is not None and options.limit < len(prompts):
        prompts = [prompts[i * len(prompts) // options.limit] for i in range(options.limit)]
    return prompts
