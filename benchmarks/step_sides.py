"""What computes the step for an attempt: diffusers, programs, ONNX Runtime, TensorRT."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from attempts import Attempt
from denoising_step import (
    DenoisingStep,
    Tensors,
    conditioner_inputs,
    denoiser_inputs,
    diffusers_step,
)
from random_transformer import RandomTransformer
from step_features import extras, with_peft

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.library import load_library
from sd35_trt.components import SHORT_DENOISER
from sd35_trt.engines.builder import EngineOptions, ExportedComponent
from sd35_trt.engines.child_process import run_in_child
from sd35_trt.export.component import (
    MODULES,
    ExportOptions,
    apply_policy,
    build_part,
    export_component,
    fake_tensors,
)
from sd35_trt.export.fused_block import fuse_blocks
from sd35_trt.export.ports import ComponentModule
from sd35_trt.export.program_writer import parameter_value
from sd35_trt.export.scales import Scales
from sd35_trt.export.short_steps import CHANGE, COEFFICIENTS, REMEMBERED
from sd35_trt.export.torch_layers import use_torch_layers
from sd35_trt.features import PLAIN, Features
from sd35_trt.formats.bundle import Component, describe_file
from sd35_trt.formats.component import MODEL_FILE
from sd35_trt.formats.program import Program
from sd35_trt.policies import Policy, Rule, load_policy
from sd35_trt.programs.torch_program import MODES, TorchProgram
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.sessions.session import Session, SessionOptions

_CLIP_TOKENS = 77

#: Computes the latents after the step.
Compute = Callable[[], torch.Tensor]


def by_diffusers(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, device: str
) -> Compute:
    from diffusers import SD3Transformer2DModel

    with torch.device(device):
        module = SD3Transformer2DModel(**model.config("transformer")).to(torch.bfloat16).eval()
    for name, tensor in module.state_dict().items():
        tensor.copy_(model.tensors.read(name))
    if attempt.kind == "torchao":
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        # Its own settings of the compiler would stay for what is measured after it; their tuning
        # takes minutes.
        plain = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
        quantize_(module.transformer_blocks, plain)
    if attempt.rank:
        with_peft(module, attempt.rank)
    if attempt.mode != "eager":
        for block in module.transformer_blocks:
            block.compile(mode=MODES[attempt.mode])
    return lambda: diffusers_step(module, step.latents, step.prompts, step.pooled)


def _policy(attempt: Attempt, model: RandomTransformer) -> Policy:
    policy = load_policy(attempt.policy)
    if not attempt.fp8_attention:
        return policy
    # Medium has two in some blocks.
    names = {name.rpartition(".")[2] for name in model.attentions()}
    rules = [
        Rule("denoiser", f"transformer_blocks.*.{name}", "fp8", "the matmuls too")
        for name in sorted(names)
    ]
    return Policy(policy.name, policy.description, (*policy.rules, *rules))


def _program(
    model: RandomTransformer, name: str, attempt: Attempt, scales: Scales, device: str
) -> tuple[Program, Tensors, ComponentModule]:
    with fake_tensors():
        part = build_part("transformer", model)  # type: ignore[arg-type]
        apply_policy(part, name, _policy(attempt, model), scales)
        use_torch_layers(part, attempt.join)
        if attempt.fuse:
            fuse_blocks(part)
        features = PLAIN if name == "conditioner" else _features(attempt, model)
        options = ExportOptions(_CLIP_TOKENS, True, "program", attempt.join, attempt.fuse, features)
        module = MODULES[name](part, options).eval()
        program = module.program()
    values = {
        key: parameter_value(module, key, model.tensors).to(device) for key in program.weights()
    }
    return program, values, module


def _features(attempt: Attempt, model: RandomTransformer) -> Features:
    """An attempt's; a model of few blocks has a ControlNet of few, and short steps of few."""
    layers = model.config("transformer")["num_layers"]
    blocks = min(attempt.features.control_blocks, layers)
    first = min(attempt.features.short_steps, layers - 1)
    return replace(attempt.features, control_blocks=blocks, short_steps=first)


def _conditioned(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, device: str
) -> Tensors:
    """What the conditioner gives, computed once, operator by operator."""
    program, weights, _ = _program(model, "conditioner", attempt, step.scales, device)
    conditioner = TorchProgram(program, weights, torch.device(device), "eager")
    return conditioner(conditioner_inputs(step, torch.float16))


def by_programs(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, device: str
) -> tuple[Compute, torch.Tensor]:
    """What computes the step; and the latents after it in FP32, with what it is given besides."""
    conditioned = _conditioned(model, step, attempt, device)
    inputs = denoiser_inputs(step, conditioned["context"], conditioned["modulation"][0])
    name = SHORT_DENOISER if attempt.short else "denoiser"
    if attempt.short:
        inputs |= _remembered(model, step, attempt, device, inputs)
    program, weights, module = _program(model, name, attempt, step.scales, device)
    truth = step.truth
    if attempt.features != PLAIN:
        given = extras(model, step, attempt, module.inputs, module.adapters)
        inputs |= given.inputs
        truth = given.truth
    run = TorchProgram(
        program, weights, torch.device(device), attempt.mode, attempt.attention, attempt.fast
    )
    return lambda: run(inputs)["next_latents"], truth


def _remembered(
    model: RandomTransformer,
    step: DenoisingStep,
    attempt: Attempt,
    device: str,
    inputs: Mapping[str, torch.Tensor],
) -> Tensors:
    """What a short step is given: the change of this very step, so that its result is the full
    one's."""
    program, weights, _ = _program(model, "denoiser", attempt, step.scales, device)
    run = TorchProgram(
        program, weights, torch.device(device), "eager", attempt.attention, attempt.fast
    )
    change = run(inputs)[CHANGE]
    coefficients = torch.tensor([[1.0, 0.0]] * len(step.latents), device=device)
    return {COEFFICIENTS: coefficients, **dict.fromkeys(REMEMBERED, change)}


def by_engine(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, device: Device, folder: Path
) -> Compute:
    """The denoiser as ONNX Runtime's engine, or TensorRT's."""
    backend = BACKENDS[attempt.kind]
    place = str(step.latents.device)
    conditioned = _conditioned(model, step, attempt, place)
    inputs = denoiser_inputs(step, conditioned["context"], conditioned["modulation"][0])
    del conditioned
    gc.collect()
    model.tensors.on_host = True
    version = getattr(load_library(backend), "__version__", None)
    options = ExportOptions(_CLIP_TOKENS, dialect=backend.dialect(version))
    policy = _policy(attempt, model)
    export_component("denoiser", model, policy, options, folder, scales=step.scales)  # type: ignore[arg-type]
    model.tensors.on_host = False
    component = ExportedComponent.read(folder)
    height, width = step.latents.shape[2:]
    dims = {
        "batch": len(step.latents), "tokens": step.prompts.shape[1], "height": height,
        "width": width,
    }  # fmt: skip
    make = _tensorrt if backend.times_kernels else _onnxruntime
    engine = make(component, device, attempt, dims)
    feed = {p.name: device.upload(inputs[p.name].cpu().numpy()) for p in component.inputs}
    outputs = {p.name: device.empty(p.resolve(**dims), p.dtype) for p in component.outputs}

    def result() -> torch.Tensor:
        engine.run(feed, outputs)
        buffer = outputs["next_latents"]
        if device.kind == "cpu":
            return torch.from_numpy(np.asarray(buffer))
        from sd35_trt.runtime.sessions.inductor import _CudaArray

        return torch.as_tensor(
            _CudaArray(device.pointer(buffer), buffer), device=step.latents.device
        )

    return result


def _onnxruntime(
    component: ExportedComponent, device: Device, attempt: Attempt, dims: Mapping[str, int]
) -> Session:
    from sd35_trt.runtime.sessions.onnxruntime import OnnxRuntimeSession, session_options

    settings = session_options(fp8=bool(component.precisions.get("fp8")))
    path = component.folder / MODEL_FILE
    return OnnxRuntimeSession(str(path), component.name, device, settings)


def _tensorrt(
    component: ExportedComponent, device: Device, attempt: Attempt, dims: Mapping[str, int]
) -> Session:
    from sd35_trt.engines.tensorrt_compiler import PlanFacts, PlanJob, compile_plan
    from sd35_trt.runtime.sessions.tensorrt import TensorRTSession

    folder = component.folder
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    bounds = {d: (n, n, n) for d, n in dims.items()}
    settings = EngineOptions(optimization_level=attempt.level, timing=folder / "timings")
    job = PlanJob(attempt.kind, (capability,), settings, component, bounds, folder)
    run_in_child("compiling the denoiser", compile_plan, job, lambda *_: None)
    (plan,) = BACKENDS[attempt.kind].files
    facts = PlanFacts.read(folder)
    entry = Component(
        component.name, attempt.kind, (describe_file(folder, plan),), component.inputs,
        component.outputs, facts.weight_bytes, {}, {},
    )  # fmt: skip
    bundle: Any = SimpleNamespace(path=lambda relative: folder / relative)
    return TensorRTSession(bundle, entry, device, SessionOptions())
