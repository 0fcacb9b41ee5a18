"""The FP8 policy against modelopt's default recipe: the error of the whole transformer.

Both are modelopt's own fake-quantized modules (E4M3, one scale per tensor, ``max``), calibrated on
the same inputs; they differ in which layers they quantize. The error is relative, against the
unquantized transformer in FP32, on other inputs.

    python benchmarks/fp8_recipes.py --out benchmarks/results

Exits with status 1 unless the policy's error is the smaller on every model.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from sd35_trt.calibration.quantizers import (
    enabled_quantizers,
    insert_quantizers,
    quantized_linears,
    quiet,
)
from sd35_trt.policies import load_policy

Inputs = Sequence[Mapping[str, Any]]

#: Half the width, few blocks: minutes on two cores.
STRUCTURES: dict[str, dict[str, Any]] = {
    "large-like": {
        "num_layers": 4, "num_attention_heads": 19, "caption_projection_dim": 1216,
    },
    "medium-like": {
        "num_layers": 5, "num_attention_heads": 12, "caption_projection_dim": 768,
        "dual_attention_layers": (0, 1, 2),
    },
}  # fmt: skip

_COMMON: dict[str, Any] = {
    "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 32, "qk_norm": "rms_norm",
}  # fmt: skip


def random_transformer(structure: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A transformer with normal weights of standard deviation 1/√fan-in and small biases."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**{**_COMMON, **structure})
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm" not in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def random_inputs(model: Any, count: int, seed: int, tokens: int = 77) -> Inputs:
    """Latents, text features and timesteps, two samples each."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {
            "hidden_states": normal(2, 16, config.sample_size, config.sample_size),
            "encoder_hidden_states": normal(2, tokens, config.joint_attention_dim),
            "pooled_projections": normal(2, config.pooled_projection_dim),
            "timestep": torch.rand(2, generator=generator) * 1000,
        }
        for _ in range(count)
    ]


def mini_inputs(prompts: int = 8) -> tuple[nn.Module, Inputs, Inputs]:
    """The packaged transformer, and what it is given while it draws; prompts by turns for both."""
    from sd35_trt.calibration.calibrate import CalibrateOptions, prepare
    from sd35_trt.calibration.run import draw, encode, load

    settings, _ = prepare(CalibrateOptions(limit=prompts, batch=1))
    pipe = load(settings, settings.parts)
    negative = encode(pipe, [""])
    inputs: list[list[dict[str, Any]]] = [[], []]

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs[turn % 2].append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    for turn, batch in enumerate(settings.batches()):
        draw(pipe, settings, batch, encode(pipe, [settings.prompts[turn]]), negative)
    handle.remove()
    return pipe.transformer, inputs[0], inputs[1]


def _outputs(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    return [model(**{**one, "return_dict": False})[0].double() for one in inputs]


def _error(model: nn.Module, inputs: Inputs, reference: Sequence[torch.Tensor]) -> float:
    pairs = list(zip(_outputs(model, inputs), reference, strict=True))
    difference = sum(float((value - expected).square().sum()) for value, expected in pairs)
    return (difference / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5


@torch.no_grad()
def compare(model: nn.Module, calibration: Inputs, evaluation: Inputs) -> dict[str, Any]:
    """Errors of both recipes on one transformer, and how many layers each quantizes."""
    with quiet():
        import modelopt.torch.quantization as mtq

    def forward_loop(quantized: nn.Module) -> None:
        for one in calibration:
            quantized(**one)

    reference = _outputs(model, evaluation)
    row: dict[str, Any] = {}
    for recipe in ("policy", "default"):
        quantized = copy.deepcopy(model)
        with quiet():
            if recipe == "policy":
                layers = [
                    name.partition("/")[2]
                    for name in quantized_linears("transformer", quantized, load_policy("fp8"))
                ]
                kinds = ("input", "weight")
                insert_quantizers(quantized, [f"{n}.{k}_quantizer" for n in layers for k in kinds])
                mtq.calibrate(quantized, "max", forward_loop)
            else:
                mtq.quantize(quantized, mtq.FP8_DEFAULT_CFG, forward_loop)
        weights = [n for n in enabled_quantizers(quantized) if n.endswith("weight_quantizer")]
        row[recipe] = {
            "error": _error(quantized, evaluation, reference),
            "layers": len(weights),
        }
        del quantized
    return row


def run(models: Sequence[str]) -> dict[str, Any]:
    """By model: :func:`compare`'s rows."""
    rows = {}
    for name in models:
        if name == "mini":
            rows[name] = compare(*mini_inputs())
        else:
            model = random_transformer(STRUCTURES[name])
            rows[name] = compare(model, random_inputs(model, 4, 1), random_inputs(model, 4, 2))
        policy, default = rows[name]["policy"], rows[name]["default"]
        print(
            f"{name:<12} {policy['error']:>8.4f} ({policy['layers']} layers)"
            f" {default['error']:>8.4f} ({default['layers']} layers)",
            flush=True,
        )
    return rows


@click.command()
@click.option("--models", default="large-like,medium-like,mini", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"))
def main(models: str, out: Path) -> None:
    """Measure, print a table, and write fp8_recipes.json."""
    print("model        fp8 policy             modelopt's default")
    rows = run(models.split(","))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "nvidia-modelopt")}
    out.mkdir(parents=True, exist_ok=True)
    data = {"versions": versions, "rows": rows}
    (out / "fp8_recipes.json").write_text(json.dumps(data, indent=1) + "\n")
    worse = [
        name for name, row in rows.items() if row["policy"]["error"] >= row["default"]["error"]
    ]
    if worse:
        sys.exit(f"the policy is worse on {', '.join(worse)}")


if __name__ == "__main__":
    main()
