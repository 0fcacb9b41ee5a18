"""Calibrations of small checkpoints, measured on random inputs, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from transformers import T5EncoderModel

from sd35_trt.calibration.ranges import RangeRecorder
from sd35_trt.components import module_owner
from sd35_trt.export.provenance import tool_versions
from sd35_trt.formats.bundle import sha256_file
from sd35_trt.formats.calibration import DESCRIPTION, Calibration, Provenance
from sd35_trt.policies import Policy, load_policy
from sd35_trt.store.replacement import write_directory


def load_transformer(checkpoint: Path) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
    return model.float().eval()


def transformer_inputs(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of three samples at 96×64 pixels and 40 text tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = model.config
    return {
        "hidden_states": normal(3, config.in_channels, 12, 8),
        "encoder_hidden_states": normal(3, 40, config.joint_attention_dim),
        "pooled_projections": normal(3, config.pooled_projection_dim),
        "timestep": torch.tensor([900.0, 500.0, 40.0]),
    }


def checkpoint_files(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by path, as a bundle records them."""
    return {
        str(path.relative_to(checkpoint)): sha256_file(path)
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
        for path in (checkpoint / part).glob("*")
    }


def save(calibration: Calibration, folder: Path) -> None:
    """Write a calibration's directory."""
    write_directory(folder, DESCRIPTION, calibration.files())


def calibrate(checkpoint: Path, policy: Policy | str = "fp8") -> Calibration:
    """Ranges of transformer and T5, and the scales that a policy needs, from one forward pass."""
    policy = load_policy(policy) if isinstance(policy, str) else policy
    inputs: dict[str, float] = {}
    bmm: dict[str, float] = {}
    transformer = load_transformer(checkpoint)
    t5 = T5EncoderModel.from_pretrained(checkpoint, subfolder="text_encoder_3").float().eval()
    activations: dict[str, float] = {}
    ids = torch.randint(
        3, t5.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)
    )
    runs: list[tuple[str, Any, Mapping[str, torch.Tensor]]] = [
        ("transformer", transformer, transformer_inputs(transformer)),
        ("text_encoder_3", t5, {"input_ids": ids}),
    ]
    for part, model, arguments in runs:
        recorder = RangeRecorder(part, model)
        for name, module in model.named_modules():
            component = module_owner(part, name) if name else None
            linear = isinstance(module, torch.nn.Linear)
            if component and linear and policy.rule(component, name, True).precision == "fp8":
                module.register_forward_hook(_record_input(inputs, f"{component}/{name}"))
        with torch.no_grad():
            model(**arguments)
        activations |= recorder.amax
    provenance = Provenance(files=checkpoint_files(checkpoint), versions=tool_versions())
    return Calibration(inputs, activations, bmm, provenance)


def _record_input(inputs: dict[str, float], name: str) -> Any:
    def record(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs[name] = max(inputs.get(name, 0.0), float(args[0].abs().max()))

    return record
