"""What computes the step for an attempt: diffusers, programs, ONNX Runtime."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
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

from sd35_trt.engines.builder import ExportedComponent
from sd35_trt.export.component import (
    MODULES,
    ExportOptions,
    apply_policy,
    build_part,
    export_component,
    fake_tensors,
)
from sd35_trt.export.fused_block import fuse_blocks
from sd35_trt.export.program_writer import parameter_value
from sd35_trt.export.scales import Scales
from sd35_trt.export.torch_layers import use_torch_layers
from sd35_trt.formats.component import MODEL_FILE
from sd35_trt.formats.program import Program
from sd35_trt.policies import Policy, Rule, load_policy
from sd35_trt.programs.torch_program import MODES, TorchProgram
from sd35_trt.runtime.devices.device import Device

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
) -> tuple[Program, Tensors]:
    with fake_tensors():
        part = build_part("transformer", model)  # type: ignore[arg-type]
        apply_policy(part, name, _policy(attempt, model), scales)
        use_torch_layers(part, attempt.join)
        if attempt.fuse:
            fuse_blocks(part)
        options = ExportOptions(_CLIP_TOKENS, True, "program", attempt.join, attempt.fuse)
        module = MODULES[name](part, options).eval()
        program = module.program()
    values = {
        key: parameter_value(module, key, model.tensors).to(device) for key in program.weights()
    }
    return program, values


def by_programs(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, device: str
) -> Compute:
    place = torch.device(device)
    program, weights = _program(model, "conditioner", attempt, step.scales, device)
    conditioner = TorchProgram(program, weights, place, "eager")
    conditioned = conditioner(conditioner_inputs(step, torch.float16))
    inputs = denoiser_inputs(step, conditioned["context"], conditioned["modulation"][0])
    del conditioner, weights
    program, weights = _program(model, "denoiser", attempt, step.scales, device)
    run = TorchProgram(program, weights, place, attempt.mode, attempt.attention, attempt.fast)
    return lambda: run(inputs)["next_latents"]


def by_onnxruntime(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, device: Device, folder: Path
) -> Compute:
    from sd35_trt.runtime.sessions.onnxruntime import OnnxRuntimeSession, session_options

    def session(name: str) -> tuple[ExportedComponent, OnnxRuntimeSession]:
        out = folder / name
        out.mkdir()
        model.tensors.on_host = True
        options = ExportOptions(_CLIP_TOKENS)
        export_component(name, model, _policy(attempt, model), options, out, scales=step.scales)  # type: ignore[arg-type]
        model.tensors.on_host = False
        component = ExportedComponent.read(out)
        settings = session_options(fp8=bool(component.precisions.get("fp8")))
        return component, OnnxRuntimeSession(str(out / MODEL_FILE), name, device, settings)

    def run(name: str, inputs: Tensors, **dims: int) -> tuple[Callable[[], None], dict[str, Any]]:
        component, engine = session(name)
        feed = {p.name: device.upload(inputs[p.name].cpu().numpy()) for p in component.inputs}
        outputs = {p.name: device.empty(p.resolve(**dims), p.dtype) for p in component.outputs}
        return functools.partial(engine.run, feed, outputs), outputs

    batch, tokens = len(step.latents), step.prompts.shape[1]
    half = conditioner_inputs(step, torch.float16)
    compute, outputs = run("conditioner", half, samples=2 * batch, tokens=tokens, steps=1)
    compute()
    context, modulation = (
        torch.from_numpy(np.asarray(device.download(outputs[name])))
        for name in ("context", "modulation")
    )
    del compute, outputs
    gc.collect()
    inputs = denoiser_inputs(step, context, modulation[0])
    height, width = step.latents.shape[2:]
    compute, outputs = run("denoiser", inputs, batch=batch, height=height, width=width)

    def result() -> torch.Tensor:
        compute()
        buffer = outputs["next_latents"]
        if device.kind == "cpu":
            return torch.from_numpy(np.asarray(buffer))
        from sd35_trt.runtime.sessions.inductor import _CudaArray

        return torch.as_tensor(
            _CudaArray(device.pointer(buffer), buffer), device=step.latents.device
        )

    return result
