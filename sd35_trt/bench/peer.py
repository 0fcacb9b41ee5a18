"""What a bundle is measured against: another bundle, or diffusers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from sd35_trt.checkpoints.hub import resolve_model
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.quality.reference import check_checkpoint, check_comparable
from sd35_trt.runtime.request import EXACT
from sd35_trt.runtime.sessions.session import device_of
from sd35_trt.store.cache import StageCache, default_cache_dir

from .contenders import Contender, EngineContender
from .options import DIFFUSERS_COMPILED, WITH_DIFFUSERS, BenchOptions
from .workload import Workload, check_request

#: What diffusers' pipeline is made of.
LIBRARIES = ("torch", "diffusers", "transformers")


def open_peer(bundle: Bundle, options: BenchOptions, workload: Workload) -> Contender | None:
    """What the bundle is measured against, not loaded yet.

    Raises:
        Sd35Error: it does not draw what the bundle draws, or is not installed.
    """
    if options.against is None:
        return None
    if options.against not in WITH_DIFFUSERS:
        other = Bundle.open(options.against, trust_kernels=options.trust_kernels)
        device_of(other, options.device)
        check_comparable(other, bundle)
        size, guidance = workload.size, workload.guidance
        check_request(other.manifest, workload.batch, workload.steps, size, guidance)
        return EngineContender(other, replace(workload, step_cache=EXACT))
    for package in LIBRARIES:
        if importlib.util.find_spec(package) is None:
            raise Sd35Error(
                f"--against {options.against} needs {package}", "pip install 'sd35-trt[build]'"
            )
    source = None if options.model is None else ModelOptions(options.model)
    check_checkpoint(bundle, source, StageCache(default_cache_dir()))
    checkpoint = resolve_model(options.model or "mini")
    if checkpoint.is_file():
        raise UsageError(
            f"diffusers does not load {checkpoint} without the hub",
            "compare bundles: --against BUNDLE",
        )
    from .diffusers import DiffusersContender

    t5 = bundle.manifest.component("t5") is not None
    single, scheduler = bundle.manifest.policy.name == "fp32", bundle.manifest.scheduler
    compiled = options.against == DIFFUSERS_COMPILED
    return DiffusersContender(checkpoint, scheduler, workload, t5, single, compiled)
