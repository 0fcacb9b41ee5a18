"""Trains the LoRAs that come with mini.

    python -m mini.training.lora night --out out/night
    python -m mini.training.lora moon --out out/moon

Each is trained on a CPU for a fixed number of steps, so its weights follow from ``--seed`` on a
machine. ``OUT/NAME.safetensors`` is what diffusers saves of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from sd35_trt.mini import checkpoint_path
from sd35_trt.mini.loras import LORAS, PackagedLora, examples
from sd35_trt.mini.scenes import Example
from sd35_trt.quality.evaluate import load

from . import batches
from .loop import Average, autocast, gradients, loop, optimizers
from .objective import Dropout, Flow
from .run import TrainingRun
from .vae import encode_all

RANK = 4
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
_BLOCKS = (*_ATTENTION, "to_add_out", "net.0.proj", "net.2")
_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained.

    Attributes:
        layers: part → what its layers' names end with.
        plain: share of the examples that are mini's own.
        steps: in all.
        peak: of the learning rate.
    """

    layers: Mapping[str, tuple[str, ...]]
    plain: float
    steps: int
    peak: float


RECIPES = {
    "night": Recipe({"transformer": _BLOCKS}, 0.0, 1000, 2e-3),
    # A new word is one for what reads the text too, and leaves captions without it alone.
    "moon": Recipe(
        {
            "transformer": _BLOCKS,
            "text_encoder": _CLIP,
            "text_encoder_2": _CLIP,
        },
        0.3,
        1000,
        2e-3,
    ),
}


def add_lora(
    pipe: StableDiffusion3Pipeline, layers: Mapping[str, tuple[str, ...]]
) -> list[nn.Parameter]:
    """Put a LoRA that changes nothing yet into some parts; all else is frozen.

    Args:
        layers: as in :class:`Recipe`.

    Returns:
        Its parameters.
    """
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        getattr(pipe, part).requires_grad_(False)
    for part, names in layers.items():
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(names)
        )
        inject_adapter_in_model(config, getattr(pipe, part))
    return [p for part in layers for p in getattr(pipe, part).parameters() if p.requires_grad]


def save_lora(pipe: StableDiffusion3Pipeline, parts: Iterable[str], path: Path) -> None:
    """Save the LoRA in some parts as diffusers does, in FP16."""
    layers = {
        f"{part}_lora_layers": {
            name: tensor.half()
            for name, tensor in get_peft_model_state_dict(getattr(pipe, part)).items()
        }
        for part in parts
    }
    pipe.save_lora_weights(path.parent, weight_name=path.name, **layers)


def mixed_examples(lora: PackagedLora, number: int, plain: float) -> list[Example]:
    """The LoRA's examples, and a share of mini's own, which stay as they are."""
    own = round(number * (1 - plain))
    return examples([lora], own, "train") + examples([], number - own, "train")


def train(run: TrainingRun, lora: PackagedLora, recipe: Recipe, number: int, batch: int) -> Path:
    """Train a LoRA on examples of its own.

    Args:
        number: of examples, each of them drawn once.

    Returns:
        Its file.
    """
    device = run.device
    pipe = load(checkpoint_path(), str(device))
    drawn = mixed_examples(lora, number, recipe.plain)
    table = batches.tabulate(drawn, checkpoint_path())
    latents = encode_all(pipe.vae, table, device, min(64, number), compiled=False)
    columns = {name: torch.from_numpy(column).to(device) for name, column in table.items()}
    torch.manual_seed(run.seed)
    parameters = add_lora(pipe, recipe.layers)
    flow = Flow(pipe, Dropout(t5=0.0, clip_l=0.0, clip_g=0.0)).to(device).train()
    methods = optimizers(parameters, recipe.peak, 0.0, device)
    average = Average({"lora": nn.ParameterList(parameters)}, 0.99)

    def losses() -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (batch,), device=device)
        with autocast(device):
            own = flow.flow(latents[rows].float(), {n: c[rows] for n, c in columns.items()})
        return {"total": own.error}

    step = gradients(losses, methods, graph=False)
    loop(run, methods, recipe.peak, step, average, warmup=50)
    with torch.no_grad():
        for parameter, value in zip(parameters, average.into, strict=True):
            parameter.copy_(value)
    path = run.out / f"{lora.name}.safetensors"
    save_lora(pipe, recipe.layers, path)
    return path


@click.command()
@click.argument("name", type=click.Choice(list(LORAS)))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of the CPU.")
@click.option("--examples", "number", default=1280, show_default=True)
@click.option("--steps", type=int, help="Default: the LoRA's own.")
@click.option("--plain", type=float, help="Share of mini's own examples. Default: likewise.")
@click.option("--lr", type=float, help="Peak learning rate. Default: likewise.")
@click.option("--batch", default=16, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    name: str,
    out: Path,
    device: str,
    threads: int,
    number: int,
    steps: int | None,
    plain: float | None,
    lr: float | None,
    batch: int,
    seed: int,
) -> None:
    """Train one of mini's LoRAs. OUT/log.jsonl tells how it went."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    own = RECIPES[name]
    recipe = replace(
        own,
        steps=own.steps if steps is None else steps,
        plain=own.plain if plain is None else plain,
        peak=own.peak if lr is None else lr,
    )
    place = torch.device(device)
    run = TrainingRun(name, out, place, math.inf, math.inf, seed, steps=recipe.steps)
    path = train(run, LORAS[name], recipe, number, batch)
    click.echo(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
