"""``sd35-trt bench``: how fast a bundle draws, stage by stage, alone or against a peer.

Every run draws a prompt that was not drawn before: the runtime keeps the embeddings of prompts, so
that a repeated one would not be encoded. The empty negative prompt is kept from the warm-up on, as
in a server.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt import __version__
from sd35_trt.backends import BACKENDS
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.quality.metrics import psnr, squared_error
from sd35_trt.quality.reference import Count, check_checkpoint, check_comparable
from sd35_trt.runtime.request import Request, make_request
from sd35_trt.runtime.sessions.session import device_of
from sd35_trt.store.cache import StageCache, default_cache_dir
from sd35_trt.store.hub import resolve_model

from .contenders import STAGES, Contender, Drawn, EngineContender, Settings
from .meters import Gpu, Others, describe_host, host_memory, usable_cores

#: Version of the JSON.
FORMAT = 1

#: The words for diffusers' pipeline in ``--against``: eager, or its blocks compiled.
DIFFUSERS = "diffusers"
DIFFUSERS_COMPILED = "diffusers-compiled"


_PROMPT = "a small red circle to the left of a large blue square"

# Seconds before a run against a peer: idle threads of the other's pool spin for a while.
_SETTLE = 0.1

# Other processes on more than this share of the cores disturb a measurement.
_BUSY = 0.1

# Pictures of one prompt and seed are more alike than those of two seeds, by so many dB.
_MARGIN = 3.0

_WITH_DIFFUSERS = (DIFFUSERS, DIFFUSERS_COMPILED)
_PEER_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class BenchOptions:
    """What ``sd35-trt bench`` takes.

    Attributes:
        bundle: the bundle's directory.
        runs: measured runs.
        warmup: runs before them.
        steps, size, guidance: None takes the bundle's.
        batch: pictures in a run, of one prompt.
        prompt: a number is added for each run.
        against: None, ``diffusers``, ``diffusers-compiled``, or another bundle's directory.
        model: with ``diffusers``, the checkpoint behind the bundle; None is mini.
        threads: CPU threads of an engine, and of PyTorch; None is all that the process may use.
        device, vram_budget, trust_kernels: as :meth:`sd35_trt.runtime.Pipeline.load` takes them.
        command: recorded in the result.
    """

    bundle: Path
    runs: int = 7
    warmup: int = 2
    steps: int | None = None
    size: tuple[int, int] | None = None
    batch: int = 1
    guidance: float | None = None
    prompt: str = _PROMPT
    against: str | None = None
    model: str | None = None
    threads: int | None = None
    device: str | None = None
    vram_budget: int | None = None
    trust_kernels: bool = False
    command: str = ""


@dataclass
class _Side:
    """What was measured of a contender."""

    contender: Contender
    load: float = 0.0
    first: float = 0.0
    warm_images: np.ndarray | None = None
    memory: dict[str, dict[str, int | None] | None] = field(default_factory=dict)
    runs: list[Drawn] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)


def bench(options: BenchOptions, count: Count = lambda *_: None) -> dict[str, Any]:
    """Measure a bundle.

    Returns:
        The result, JSON-serializable: seconds, bytes and joules; see :data:`FORMAT`.

    Raises:
        UsageError: an argument that the bundle does not accept.
        Sd35Error: the bundle or its peer cannot be run, or the checkpoint is not the bundle's.
    """
    start = time.perf_counter()
    bundle = Bundle.open(options.bundle, trust_kernels=options.trust_kernels)
    settings = _settings(bundle, options)
    peer = _peer(bundle, options, settings)
    gpu, note = Gpu.open() if settings.device != "cpu" else (None, "")
    notes = [note] if note else []
    sides = [_Side(EngineContender(bundle, settings))]
    if peer is not None:
        sides.append(_Side(peer))
    with contextlib.ExitStack() as stack:
        if gpu is not None:
            stack.callback(gpu.close)
        for number, side in enumerate(sides):
            stack.callback(side.contender.close)
            _start(side, settings, gpu, number, len(sides), count)
        others = Others()
        for run in range(settings.runs):
            # Each goes first in turn.
            for side in sides if run % 2 == 0 else reversed(sides):
                if peer is not None:
                    time.sleep(_SETTLE)
                _run(side, settings, run, gpu)
            count("runs", run + 1, settings.runs)
        busy = round(others.cores(), 2)
        described = [_describe(side, settings) for side in sides]
        device = gpu.describe() if gpu is not None else {"name": settings.device}
    disturbed = busy > _BUSY * usable_cores()
    if disturbed:
        notes.append(f"other processes kept {busy:.1f} of {usable_cores()} cores busy meanwhile")
    notes += dict.fromkeys(note for side in sides for note in side.runs[-1].notes)
    comparison = _compare(*sides) if peer is not None else None
    if comparison and not comparison["same_work"]:
        notes.append(
            "the pictures of the two are hardly more alike than those of two seeds: this may not "
            "be the same work"
        )
    return {
        "format": FORMAT,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "host": {**describe_host(), "others_cores": busy},
        "device": {"kind": settings.device, **device},
        "versions": _versions(bundle.manifest, options),
        "settings": asdict(settings),
        "bundle": described[0],
        "peer": described[1] if peer is not None else None,
        "comparison": comparison,
        "disturbed": disturbed,
        "notes": notes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def check_result_file(out: Path) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        UsageError: names the fix.
    """
    folder = out.absolute().parent
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory", "name a file in it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"{folder} is not a writable directory", "make it, or choose another --out"
        )


def save_result(result: Mapping[str, Any], out: Path) -> None:
    """Write a result as JSON, whole or not at all.

    Raises:
        Sd35Error: the file cannot be written.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Sd35Error(
            f"cannot write {out}: {error.strerror or error}", "free space or choose another --out"
        ) from error


def _settings(bundle: Bundle, options: BenchOptions) -> Settings:
    """Check what was asked for, before anything is loaded.

    Raises:
        UsageError: names the argument and the nearest value that works.
    """
    if options.model is not None and options.against not in _WITH_DIFFUSERS:
        raise UsageError("--model is for --against diffusers", "leave it out")
    device = device_of(bundle, options.device)
    m = bundle.manifest
    request = _request(m, options.batch, options.steps, options.size, options.guidance)
    return Settings(
        device=device,
        vram_budget=options.vram_budget,
        threads=options.threads or usable_cores(),
        prompt=options.prompt,
        steps=request.steps,
        size=(request.width, request.height),
        batch=options.batch,
        guidance=request.guidance[0],
        sampler=request.sampler,
        t5_tokens=request.t5_tokens,
        runs=options.runs,
        warmup=options.warmup,
    )


def _request(
    manifest: Manifest,
    batch: int,
    steps: int | None,
    size: tuple[int, int] | None,
    guidance: float | None,
) -> Request:
    return make_request(
        manifest, prompt="", negative="", seed=0, steps=steps, guidance=guidance, shift=None,
        size=size, batch=batch, sampler=None, t5_tokens=None, image=None, strength=1.0,
    )  # fmt: skip


def _peer(bundle: Bundle, options: BenchOptions, settings: Settings) -> Contender | None:
    """What the bundle is measured against, not loaded yet.

    Raises:
        Sd35Error: it does not draw what the bundle draws, or is not installed.
    """
    if options.against is None:
        return None
    if options.against not in _WITH_DIFFUSERS:
        other = Bundle.open(options.against, trust_kernels=options.trust_kernels)
        device_of(other, options.device)
        check_comparable(other, bundle)
        _request(other.manifest, settings.batch, settings.steps, settings.size, settings.guidance)
        return EngineContender(other, settings)
    for package in _PEER_LIBRARIES:
        if importlib.util.find_spec(package) is None:
            raise Sd35Error(
                f"--against {options.against} needs {package}", "pip install 'sd35-trt[build]'"
            )
    check_checkpoint(bundle, options.model, StageCache(default_cache_dir()))
    checkpoint = resolve_model(options.model or "mini")
    if checkpoint.is_file():
        raise UsageError(
            f"diffusers does not load {checkpoint} without the hub",
            "compare bundles: --against BUNDLE",
        )
    from .peer import DiffusersContender

    t5 = bundle.manifest.component("t5") is not None
    single = bundle.manifest.policy.name == "fp32"
    compiled = options.against == DIFFUSERS_COMPILED
    return DiffusersContender(checkpoint, settings, t5, single, compiled)


def _start(
    side: _Side, settings: Settings, gpu: Gpu | None, number: int, sides: int, count: Count
) -> None:
    """Load a contender and warm it up, watching how much memory that takes."""
    with contextlib.ExitStack() as watch:
        host = watch.enter_context(host_memory())
        device = watch.enter_context(gpu.memory()) if gpu is not None else None
        side.load = side.contender.load()
        for i in range(settings.warmup):
            drawn = side.contender.draw(f"{settings.prompt} ({i})", i * settings.batch)
            if i == 0:
                side.first = drawn.stages["total"]
            side.warm_images = drawn.images
            count("warm-up", number * settings.warmup + i + 1, sides * settings.warmup)
    side.memory = {
        "host": host.as_dict(),
        "device": device.as_dict() if device is not None else None,
    }


def _run(side: _Side, settings: Settings, run: int, gpu: Gpu | None) -> None:
    number = settings.warmup + run
    before = gpu.energy() if gpu is not None else None
    drawn = side.contender.draw(f"{settings.prompt} ({number})", number * settings.batch)
    after = gpu.energy() if gpu is not None else None
    side.joules.append(None if before is None or after is None else after - before)
    if side.runs:  # only the last pictures are looked at
        side.runs[-1] = replace(side.runs[-1], images=side.runs[-1].images[:0])
    side.runs.append(drawn)


def _describe(side: _Side, settings: Settings) -> dict[str, Any]:
    """Identity and figures of a contender."""
    runs = side.runs
    stages = {
        name: _spread(run.stages[name] for run in runs) if name in runs[0].stages else None
        for name in STAGES
    }
    joules = [j for j in side.joules if j is not None]
    whole = len(joules) == len(runs)
    images = settings.batch * len(runs)
    return {
        **side.contender.describe(),
        "load_seconds": round(side.load, 6),
        "first_seconds": round(side.first, 6),
        "stages": stages,
        "step": _spread(step for run in runs for step in run.steps),
        "images_per_second": round(
            settings.batch / float(np.median([run.stages["total"] for run in runs])), 6
        ),
        "memory": side.memory,
        "joules_per_image": round(sum(joules) / images, 3) if whole else None,
        "runs": [
            {
                **{name: round(value, 6) for name, value in run.stages.items()},
                "steps": [round(step, 6) for step in run.steps],
                "joules": energy,
            }
            for run, energy in zip(runs, side.joules, strict=True)
        ],
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Median, and the bounds of the middle 80 %."""
    numbers = list(values)
    low, median, high = np.percentile(numbers, (10, 50, 90)).tolist()
    return {
        "median": round(median, 6), "p10": round(low, 6), "p90": round(high, 6), "n": len(numbers)
    }  # fmt: skip


def _compare(ours: _Side, peer: _Side) -> dict[str, Any]:
    """Ratios of ours to the peer's, the median over the pairs of runs; and how alike the last
    pictures are, None for equal ones."""
    ratios: dict[str, Any] = {"load": {"ratio": round(ours.load / peer.load, 4)}}
    for name in STAGES:
        if name in ours.runs[0].stages and name in peer.runs[0].stages:
            pairs = [[run.stages[name] for run in side.runs] for side in (ours, peer)]
            ratios[name] = _ratio(*pairs)
    steps = [[float(np.median(run.steps)) for run in side.runs] for side in (ours, peer)]
    ratios["step"] = _ratio(*steps)
    last, other = ours.runs[-1].images, ours.warm_images
    assert other is not None
    alike = psnr(squared_error(last, peer.runs[-1].images))
    unlike = psnr(squared_error(last, other))
    return {
        "ratios": ratios,
        "psnr_db": alike,
        "psnr_of_two_seeds_db": unlike,
        "same_work": alike is None or unlike is None or alike > unlike + _MARGIN,
    }


def _ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Over the pairs of runs: what disturbs the machine for a while disturbs both of a pair."""
    low, median, high = np.percentile(np.divide(ours, peer), (10, 50, 90)).tolist()
    return {"ratio": round(median, 4), "p10": round(low, 4), "p90": round(high, 4)}


def _versions(manifest: Manifest, options: BenchOptions) -> dict[str, str]:
    backend = BACKENDS[manifest.builder]
    names = ["numpy", *backend.packages, *(c.package for c in backend.companions)]
    if options.against in _WITH_DIFFUSERS:
        names += _PEER_LIBRARIES
    found = {"sd35-trt": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
