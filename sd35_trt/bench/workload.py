"""What both sides of a benchmark draw."""

from __future__ import annotations

from dataclasses import dataclass

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.runtime.request import EXACT, Request, make_request
from sd35_trt.runtime.sessions.session import device_of

from .meters import usable_cores
from .options import WITH_DIFFUSERS, BenchOptions


@dataclass(frozen=True)
class Workload:
    """What is drawn, with the bundle's defaults filled in.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``; two with a comma between.
        vram_budget: bytes that a bundle keeps to; None where there is no limit.
        prompt: before the number of the run is added.
        step_cache: of the bundle; its peer draws exactly.
    """

    device: str
    vram_budget: int | None
    threads: int
    prompt: str
    steps: int
    size: tuple[int, int]
    batch: int
    guidance: float
    sampler: str
    t5_tokens: int
    runs: int
    warmup: int
    step_cache: str = EXACT


def decide_workload(bundle: Bundle, options: BenchOptions) -> Workload:
    """Check what was asked for, before anything is loaded.

    Raises:
        UsageError: names the argument and the nearest value that works.
    """
    if options.model is not None and options.against not in WITH_DIFFUSERS:
        raise UsageError("--model is for --against diffusers", "leave it out")
    device = device_of(bundle, options.device)
    m = bundle.manifest
    request = check_request(
        m, options.batch, options.steps, options.size, options.guidance, options.step_cache
    )
    return Workload(
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
        step_cache=options.step_cache,
    )


def check_request(
    manifest: Manifest,
    batch: int,
    steps: int | None,
    size: tuple[int, int] | None,
    guidance: float | None,
    step_cache: str = EXACT,
) -> Request:
    """A request with the bundle's defaults filled in.

    Raises:
        UsageError: names the argument and the nearest value that works.
    """
    return make_request(
        manifest, prompt="", negative="", seed=0, steps=steps, guidance=guidance, shift=None,
        size=size, batch=batch, sampler=None, t5_tokens=None, image=None, strength=1.0,
        step_cache=step_cache,
    )  # fmt: skip
