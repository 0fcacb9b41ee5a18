"""What a step is given besides, and what it is then in FP32 by diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from attempts import CONTROL_BLOCKS, Attempt
from denoising_step import DenoisingStep, Tensors, diffusers_step
from random_transformer import RandomTransformer

from sd35_trt.export.ports import Ports
from sd35_trt.formats.bundle import ADAPTER_SCALES, RESIDUALS, AdapterGroup

# How much of an adapter each image has.
_SCALE = 0.8

# Standard deviation of what an adapter adds to a weight, of the weight's own.
_SHARE = 0.3

_SKIPPED = (7, 8, 9)
_SKIP_SCALE = 2.8


@dataclass(frozen=True)
class Extras:
    """Inputs of a denoiser besides a plain one's, and the step's result with them.

    Attributes:
        inputs: by port.
        truth: the latents after the step.
    """

    inputs: Tensors
    truth: torch.Tensor


def extras(
    model: RandomTransformer,
    step: DenoisingStep,
    attempt: Attempt,
    ports: Ports,
    groups: Iterable[AdapterGroup],
) -> Extras:
    """What an attempt is given.

    Args:
        ports, groups: the denoiser's.
    """
    device, batch = step.latents.device, len(step.latents)
    inputs: Tensors = {}
    options: dict[str, Any] = {}
    groups = list(groups)
    for name, (dtype, shape) in ports.items():
        if any(name in (group.down, group.up) for group in groups):
            dims = [attempt.rank if dim == "rank" else int(dim) for dim in shape]
            scale = _deviation(name, dims)
            inputs[name] = (torch.randn(dims, device=device) * scale).to(dtype)
    if groups:
        inputs[ADAPTER_SCALES] = torch.full((batch, attempt.rank), _SCALE, device=device).half()
    if "layer_mask" in ports:
        layers = int(ports["layer_mask"][1][1])
        mask = torch.ones(batch if attempt.skips else 0, layers, device=device)
        skipped = [layer for layer in _SKIPPED if layer < layers] or [0]
        mask[:, skipped] = 0.0
        scale = _SKIP_SCALE if attempt.skips else 0.0
        inputs |= {"layer_mask": mask, "skip_guidance": torch.full((batch,), scale, device=device)}
        if attempt.skips:
            options |= {"skip_layers": skipped, "skip_scale": scale}
    if RESIDUALS in ports:
        inputs[RESIDUALS] = _residuals(model, step, attempt.controlled)
        if attempt.controlled:
            options["residuals"] = [own.float() for own in inputs[RESIDUALS]]
    with _merged(model, inputs, groups) if attempt.rank else nullcontext():
        truth = diffusers_step(model.module, step.latents, step.prompts, step.pooled, **options)
    return Extras(inputs, truth)


def _deviation(name: str, dims: list[int]) -> float:
    """So that the product of both matrices is small beside a weight, which has 1 / √(3 in)."""
    if name.endswith("_down"):
        return float(dims[1] ** -0.5)
    return float(_SHARE * (3 * max(dims[2], 1)) ** -0.5)


def _residuals(model: RandomTransformer, step: DenoisingStep, controlled: bool) -> torch.Tensor:
    config = model.config("transformer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patches = step.latents[0, 0].numel() // config["patch_size"] ** 2
    shape = (2 * len(step.latents), patches) if controlled else (1, 1)
    count = min(CONTROL_BLOCKS, config["num_layers"])
    values = torch.zeros(count, *shape, width, dtype=torch.float16, device=step.latents.device)
    return values.normal_(std=0.02) if controlled else values


@contextmanager
def _merged(
    model: RandomTransformer, inputs: Tensors, groups: Iterable[AdapterGroup]
) -> Iterator[None]:
    """The adapters' products added to the weights."""

    def add(sign: int) -> None:
        for group in groups:
            for block, names in enumerate(group.layers):
                for linear, name in enumerate(names):
                    weight = model.module.get_submodule(name.removeprefix("transformer/")).weight
                    down = inputs[group.down][block, :, linear].float()
                    up = inputs[group.up][block, linear].float()
                    weight.data += sign * _SCALE * (down @ up).t()

    add(1)
    yield
    add(-1)  # no copies: a large model's would not fit beside it


def with_peft(module: Any, rank: int) -> None:
    """Give diffusers' transformer an adapter of the linears that ours are given one of."""
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0",
               "to_add_out", "net.0.proj", "net.2"]  # fmt: skip
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=targets)
    module.add_adapter(config)
