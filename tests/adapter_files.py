"""LoRAs of a checkpoint's layers, in the spellings of those who save them, for the tests.

Names in the original layout come from the tests' own mapping, not the exporter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from originals import Tensors
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from sd35_trt.formats.adapter import Adapter, AdapterLayer, adapter_slots, write_adapter
from sd35_trt.formats.bundle import Bundle

#: What each part is called in front of its names: diffusers', ComfyUI's, kohya's.
PREFIXES = {
    "transformer": ("transformer.", "diffusion_model.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "clip_l.transformer.", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "clip_g.transformer.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "t5xxl.transformer.", "lora_te3_"),
}


@dataclass(frozen=True)
class LowRank:
    """Down [r, in, …] and up [out, r, …] of a layer, and alpha; None is r."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None = None

    def delta(self) -> torch.Tensor:
        """What is added to the weight, [out, in, …]."""
        rank = self.down.shape[0]
        product = self.up.flatten(1).double() @ self.down.flatten(1).double()
        scaled = product * ((self.alpha or rank) / rank)
        return scaled.reshape(-1, *self.down.shape[1:]).float()


#: Layer → what is added to it.
Layers = dict[str, LowRank]


def random_layers(
    weights: Mapping[str, torch.Tensor],
    names: Iterable[str],
    rank: int = 3,
    alpha: float | None = 2.0,
    seed: int = 0,
) -> Layers:
    """Matrices for some layers of which the weights are given, each about as large as these."""
    noise, layers = torch.Generator().manual_seed(seed), {}
    for name in names:
        rows, *rest = weights[f"{name}.weight"].shape
        size = float(weights[f"{name}.weight"].float().std())
        down = torch.randn(rank, *rest, generator=noise)
        up = torch.randn(rows, rank, *(1 for _ in rest[1:]), generator=noise) * size
        layers[name] = LowRank(down, up / rank**0.5, alpha)
    return layers


def diffusers_names(part: str, layers: Layers) -> Tensors:
    """As diffusers and PEFT spell them, alphas beside them."""
    return _spelled(layers, PREFIXES[part][0], str, ("lora_A", "lora_B"))


def comfy_names(part: str, layers: Layers) -> Tensors:
    """As ComfyUI's trainers spell them."""
    return _spelled(layers, PREFIXES[part][1], str, ("lora_A", "lora_B"))


def kohya_names(part: str, layers: Layers) -> Tensors:
    """As kohya's scripts spell them."""
    flat = lambda name: name.replace(".", "_")  # noqa: E731
    return _spelled(layers, PREFIXES[part][2], flat, ("lora_down", "lora_up"))


def _spelled(
    layers: Layers, prefix: str, spell: Callable[[str], str], roles: tuple[str, str]
) -> Tensors:
    tensors: Tensors = {}
    for name, layer in layers.items():
        key = prefix + spell(name)
        tensors[f"{key}.{roles[0]}.weight"] = layer.down
        tensors[f"{key}.{roles[1]}.weight"] = layer.up
        if layer.alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def write(path: Path, *tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A file of some tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    every = {name: t.clone().contiguous() for own in tensors for name, t in own.items()}
    save_file(every, path, dict(metadata or {}))
    return path


_CONFIGS: dict[str, Any] = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}


def peft_adapter(model: torch.nn.Module, kind: str, seed: int = 0, **settings: Any) -> PeftModel:
    """PEFT's model around a model, its adapter random and about as large as the weights."""
    wrapped = get_peft_model(model, _CONFIGS[kind](**settings))
    randomize(wrapped, seed)
    return wrapped


def randomize(model: PeftModel, seed: int, name: str = "default") -> None:
    """Random values for all that an adapter has learnt."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" not in key:
                continue
            values = torch.randn(parameter.shape, generator=noise)
            if "magnitude" in key:
                parameter.mul_(1 + 0.2 * values)
            else:
                parameter.copy_(0.1 * values)


def scale(model: PeftModel, factor: float, name: str = "default") -> None:
    """What the user's scale is in PEFT."""
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= factor


_SLOT = "transformer/transformer_blocks.0.attn.to_q"


def random_adapter(bundle: Path, path: Path, seed: int) -> Path:
    """An adapter of ours, of rank 4 for one linear, written to a file."""
    values = np.random.default_rng(seed)
    inner, outer = adapter_slots(Bundle.open(bundle).manifest)[_SLOT].shape
    layer = AdapterLayer(
        values.normal(0, 0.2, (4, inner)).astype(np.float32),
        values.normal(0, 0.2, (outer, 4)).astype(np.float32),
    )
    write_adapter(path, Adapter({_SLOT: layer}, f"{seed:064x}"))
    return path
