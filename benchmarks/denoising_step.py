"""One step of a denoiser: what it is given, and what it is in FP32 by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from random_transformer import RandomTransformer
from torch import nn

from sd35_trt.export.scales import Scales

_GUIDANCE = 3.5

# Of the flow's time, 1 to 0: a step in the middle.
_SIGMA, _NEXT = 0.7, 0.65

# Layers of an attention that put out its operands.
_OPERANDS = {
    "norm_q": "q", "norm_added_q": "q", "norm_k": "k", "norm_added_k": "k", "to_v": "v",
    "add_v_proj": "v",
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DenoisingStep:
    """What a step is given, of both branches, the unconditional one first; and its result."""

    latents: torch.Tensor
    prompts: torch.Tensor
    pooled: torch.Tensor
    scales: Scales
    truth: torch.Tensor


def random_inputs(
    config: dict[str, Any], batch: int, side: int, tokens: int, device: str
) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    shapes = (
        (batch, config["in_channels"], side, side),
        (2 * batch, tokens, config["joint_attention_dim"]),
        (2 * batch, config["pooled_projection_dim"]),
    )
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def diffusers_step(
    module: Any,
    latents: Any,
    prompts: Any,
    pooled: Any,
    residuals: list[torch.Tensor] | None = None,
    skip_layers: list[int] | None = None,
    skip_scale: float = 0.0,
) -> torch.Tensor:
    """The latents after the step, FP32.

    Args:
        residuals: of a ControlNet's blocks.
        skip_layers: of a third branch, whose difference counts ``skip_scale``.
    """
    dtype = module.dtype

    def velocity(branches: slice, **options: Any) -> torch.Tensor:
        samples = torch.cat([latents, latents])[branches]
        sample: torch.Tensor = module(
            hidden_states=samples.to(dtype),
            encoder_hidden_states=prompts[branches].to(dtype),
            pooled_projections=pooled[branches].to(dtype),
            timestep=torch.full((len(samples),), 1000 * _SIGMA, device=latents.device),
            **options,
        ).sample.float()
        return sample

    controls = {} if residuals is None else {"block_controlnet_hidden_states": residuals}
    uncond, cond = velocity(slice(None), **controls).chunk(2)
    guided = uncond + _GUIDANCE * (cond - uncond)
    if skip_layers:
        skipped = velocity(slice(len(latents), None), skip_layers=skip_layers)
        guided = guided + skip_scale * (cond - skipped)
    return latents + (_NEXT - _SIGMA) * guided


def true_step(model: RandomTransformer, latents: Any, prompts: Any, pooled: Any) -> DenoisingStep:
    """The step in FP32, and the largest input of every linear, and operand of every attention."""
    from sd35_trt.compat.diffusers import Attention

    amax: dict[str, float] = {}
    bmm: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            amax[f"denoiser/{name}"] = float(inputs[0].abs().amax())

        return hook

    def operand(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            bmm[key] = max(bmm.get(key, 0.0), float(output.abs().amax()))

        return hook

    hooks = []
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(watch(name)))
        if isinstance(module, Attention):
            key = f"denoiser/{name}"
            bmm[f"{key}.p"] = 1.0
            for child, letter in _OPERANDS.items():
                if getattr(module, child, None) is not None:
                    layer = getattr(module, child)
                    hooks.append(layer.register_forward_hook(operand(f"{key}.{letter}")))
    truth = diffusers_step(model.module, latents, prompts, pooled)
    for handle in hooks:
        handle.remove()
    return DenoisingStep(latents, prompts, pooled, Scales(amax, bmm), truth)


def conditioner_inputs(step: DenoisingStep, dtype: torch.dtype) -> Tensors:
    timesteps = torch.tensor([1000 * _SIGMA], device=step.latents.device)
    features = {"prompt_embeds": step.prompts.to(dtype), "pooled": step.pooled.to(dtype)}
    return {**features, "timesteps": timesteps}


def denoiser_inputs(
    step: DenoisingStep, context: torch.Tensor, modulation: torch.Tensor
) -> Tensors:
    """Of a denoiser; ``modulation`` is of one step."""
    device, batch = step.latents.device, len(step.latents)
    ratio = _NEXT / _SIGMA
    return {
        "latents": step.latents,
        "sigma": torch.full((batch,), _SIGMA, device=device),
        "coefficients": torch.tensor([[ratio, 1 - ratio, 0.0]] * batch, device=device),
        "previous_denoised": torch.zeros_like(step.latents),
        "context": context[batch:].contiguous(),
        "modulation": modulation[batch:].contiguous(),
        "uncond_context": context[:batch].contiguous(),
        "uncond_modulation": modulation[:batch].contiguous(),
        "guidance": torch.full((batch,), _GUIDANCE, device=device),
    }
