"""Whether a LoRA leaves the range that FP8's scales were calibrated for: one step, equal inputs.

    python benchmarks/lora_scales.py

diffusers draws mini in FP32 with a LoRA, and the transformer's calls are kept. Each is then
computed again with the inputs and weights of the ``fp8`` policy's linears rounded to E4M3: by the
packaged scales, which were calibrated without a LoRA, and by scales of these very inputs. Inputs
that are cut off at the calibrated range, and not rounded, show what is beyond it. The error is that
of the guided velocity, relative, the mean of all steps but the last, where little noise is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sd35_trt.export.fp8 import fp8_scale
from sd35_trt.formats.calibration import E4M3_MAX, Calibration
from sd35_trt.mini import calibration_path, checkpoint_path, lora_paths
from sd35_trt.mini.scoring import GUIDANCE, heldout
from sd35_trt.quality.evaluate import load

_STEPS = 8
_CAPTIONS = 4

#: Of a linear's input, and the largest magnitude it was calibrated with.
Change = Callable[[Tensor, float], Tensor]
#: Of the transformer: its arguments and its velocity.
Call = tuple[dict[str, Any], Tensor]


def rounded(x: Tensor, amax: float) -> Tensor:
    """To E4M3 and back, by the scale of a largest magnitude."""
    scale = fp8_scale(torch.tensor(amax), torch.float16).float()
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


CHANGES: dict[str, Change] = {
    "calibrated scales": rounded,
    "scales of these inputs": lambda x, amax: rounded(x, float(x.abs().max())),
    "cut off, not rounded": lambda x, amax: x.clamp(-amax, amax),
}


def quantized_linears(transformer: nn.Module) -> dict[str, tuple[nn.Linear, float]]:
    """The linears of the ``fp8`` policy inside what PEFT puts around them, and their amax."""
    inputs = Calibration.load(calibration_path()).inputs
    found = {}
    for name, module in transformer.named_modules():
        amax = inputs.get(f"denoiser/{name.removesuffix('.base_layer')}")
        if isinstance(module, nn.Linear) and amax is not None:
            found[name] = module, amax
    return found


@contextmanager
def changed(transformer: nn.Module, change: Change, weights: bool) -> Iterator[None]:
    """The transformer with the inputs of the quantized linears changed, and maybe their weights."""
    linears = quantized_linears(transformer).values()
    kept = [linear.weight.data for linear, _ in linears]
    hooks = [
        linear.register_forward_pre_hook(partial(lambda a, _, x: (change(x[0], a),), amax))
        for linear, amax in linears
    ]
    for linear, _ in linears if weights else ():
        linear.weight.data = rounded(linear.weight.data, float(linear.weight.data.abs().max()))
    yield
    for hook in hooks:
        hook.remove()
    for (linear, _), weight in zip(linears, kept, strict=True):
        linear.weight.data = weight


def calls(pipe: StableDiffusion3Pipeline) -> list[Call]:
    """What the transformer is called with, and gives, in the steps of some captions."""
    kept: list[Call] = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, _, arguments, output: kept.append((arguments, output[0])), with_kwargs=True
    )
    seeds = [torch.Generator().manual_seed(seed) for seed in range(_CAPTIONS)]
    pipe(
        [e.caption for e in heldout(_CAPTIONS)], num_inference_steps=_STEPS, generator=seeds,
        guidance_scale=GUIDANCE, max_sequence_length=32, output_type="latent",
    )  # fmt: skip
    hook.remove()
    return kept


def guided(velocity: Tensor) -> Tensor:
    """Of both branches, unconditional first."""
    without, with_ = velocity.chunk(2)
    return (without + GUIDANCE * (with_ - without)).flatten(1)


@torch.no_grad()
def errors(pipe: StableDiffusion3Pipeline) -> dict[str, float]:
    """Error of one step by each of :data:`CHANGES`, and of the first without guidance."""
    kept = calls(pipe)[:-1]
    result: dict[str, float] = {}
    for name, change in CHANGES.items():
        with changed(pipe.transformer, change, "not rounded" not in name):
            found = [(pipe.transformer(**arguments)[0], velocity) for arguments, velocity in kept]
        if not result:
            result["without guidance"] = mean_error(
                [(a.flatten(1), b.flatten(1)) for a, b in found]
            )
        result[name] = mean_error([(guided(a), guided(b)) for a, b in found])
    return result


def mean_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean relative error of values [n, k] against others."""
    errors = [(a - b).norm(dim=1) / b.norm(dim=1) for a, b in pairs]
    return float(torch.cat(errors).mean())


def random_lora(folder: Path) -> Path:
    """A LoRA of the transformer, random and as large as its weights."""
    pipe = load(checkpoint_path())
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    layers += ["to_add_out", "net.0.proj", "net.2", "norm1.linear", "norm1_context.linear"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=layers)
    pipe.transformer.add_adapter(config)
    noise = torch.Generator().manual_seed(0)
    for module in pipe.transformer.modules():
        if hasattr(module, "lora_B"):
            spread = float(module.base_layer.weight.detach().std()) / 2
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            down.data = torch.randn(down.shape, generator=noise)
            up.data = spread * torch.randn(up.shape, generator=noise)
    state = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(folder, transformer_lora_layers=state, weight_name="random.safetensors")
    return folder / "random.safetensors"


@click.command()
@click.option("--scale", "scales", multiple=True, type=float, default=(0.2, 0.5, 1.0))
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/lora-scales"))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(scales: tuple[float, ...], work: Path, out: Path | None) -> None:
    """Print the error of one FP8 step without LoRA, with mini's, and with a random one."""
    work.mkdir(parents=True, exist_ok=True)
    loras: Mapping[str, Path] = {**lora_paths(), "random": random_lora(work)}
    rows: list[dict[str, Any]] = [{"lora": "none", "scale": 0.0, **errors(load(checkpoint_path()))}]
    for name, path in loras.items():
        pipe = load(checkpoint_path())
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        for scale in scales if name == "random" else (1.0,):
            pipe.set_adapters([name], [scale])
            rows.append({"lora": name, "scale": scale, **errors(pipe)})
    columns = ("without guidance", *CHANGES)
    table = Table("LoRA", "scale", *columns)
    for row in rows:
        table.add_row(row["lora"], f"{row['scale']:g}", *(f"{row[c]:.4f}" for c in columns))
    Console().print(table)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
