"""A peer, the usual way: diffusers' whole transformer, modelopt, TorchScript, TensorRT.

Modelopt's default configuration puts every linear of it in FP8. The scripts that come with modelopt
and with TensorRT export it so; guidance and the sampler's update stay PyTorch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attempts import Attempt
from denoising_step import DenoisingStep, diffusers_step
from random_transformer import RandomTransformer
from torch import nn

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.library import load_library
from sd35_trt.compat.requirement import requirement
from sd35_trt.engines.child_process import run_in_child

_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
_OUTPUT = "velocity"


class _Whole(nn.Module):
    """The transformer with positional inputs and a tensor as its output."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(_INPUTS, inputs, strict=True))
        velocity: torch.Tensor = self.transformer(**named, return_dict=False)[0]
        return velocity


@dataclass(frozen=True)
class _PlanJob:
    graph: Path
    plan: Path


class _Engine:
    """Stands for the transformer: the plan, which is run on the current stream."""

    dtype = torch.float16

    def __init__(self, plan: Path, outputs: tuple[int, ...]) -> None:
        trt = load_library(BACKENDS["tensorrt"])
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        self._context = self._engine.create_execution_context()
        self._velocity = torch.empty(outputs, dtype=self.dtype, device="cuda")

    def __call__(self, **inputs: torch.Tensor) -> Any:
        for name, value in inputs.items():
            self._context.set_tensor_address(name, value.data_ptr())
        self._context.set_tensor_address(_OUTPUT, self._velocity.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT does not run the plan")
        return self

    @property
    def sample(self) -> torch.Tensor:
        return self._velocity


def by_the_usual_way(
    model: RandomTransformer, step: DenoisingStep, attempt: Attempt, folder: Path
) -> Callable[[], torch.Tensor]:
    """The transformer in ``half`` or ``fp8``, exported and compiled so.

    Args:
        folder: for the graph, its weights and the plan.
    """
    inputs = _inputs(step)
    graph = _export(_transformer(model), inputs, attempt.policy == "fp8", folder)
    torch.cuda.empty_cache()
    plan = folder / "usual.plan"
    run_in_child("compiling the peer", _compile, _PlanJob(graph, plan), lambda *_: None)
    engine = _Engine(plan, tuple(inputs[0].shape))
    return lambda: diffusers_step(engine, step.latents, step.prompts, step.pooled)


def _transformer(model: RandomTransformer) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    with torch.device("cuda"):
        module: nn.Module = SD3Transformer2DModel(**model.config("transformer")).half().eval()
    for name, tensor in module.state_dict().items():
        tensor.copy_(model.tensors.read(name))
    return module


def _inputs(step: DenoisingStep) -> tuple[torch.Tensor, ...]:
    """What :func:`diffusers_step` gives the transformer."""
    inputs: list[torch.Tensor] = []

    class Recorder:
        dtype = torch.float16
        sample = torch.zeros_like(torch.cat([step.latents, step.latents]))

        def __call__(self, **named: torch.Tensor) -> Any:
            inputs.extend(named[name] for name in _INPUTS)
            return self

    diffusers_step(Recorder(), step.latents, step.prompts, step.pooled)
    return tuple(inputs)


def _export(
    transformer: nn.Module, inputs: tuple[torch.Tensor, ...], fp8: bool, folder: Path
) -> Path:
    import modelopt.torch.quantization as mtq

    whole = _Whole(transformer)
    if fp8:
        mtq.quantize(whole, mtq.FP8_DEFAULT_CFG, lambda module: module(*inputs))
    graph = folder / "usual.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole,
            inputs,
            str(graph),
            dynamo=False,
            opset_version=20,
            input_names=list(_INPUTS),
            output_names=[_OUTPUT],
        )
    return graph


def _compile(job: _PlanJob, report: Callable[[float, str], None]) -> None:
    with requirement("the usual way", "compare"):
        from polygraphy.backend.trt import (
            create_config,
            engine_bytes_from_network,
            network_from_onnx_path,
        )

    report(0.0, "parsing")
    builder, network, parser = network_from_onnx_path(str(job.graph), strongly_typed=True)
    config = create_config(builder, network)
    with engine_bytes_from_network((builder, network, parser), config) as plan:
        job.plan.write_bytes(plan)
