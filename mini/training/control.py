"""Trains the ControlNet that comes with mini, for edges.

    python -m mini.training.control all --out out/canny

``data`` finds the edges of scenes and needs OpenCV; ``train`` needs what ``data`` wrote, and does
well to have a GPU. ``OUT/canny`` is what diffusers saves of the net.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from sd35_trt.calibration.controlnets import encode_hints
from sd35_trt.mini import checkpoint_path
from sd35_trt.quality.evaluate import load

from . import batches
from .edges import pictures_of, read_edges, write_edges
from .loop import Average, autocast, gradients, loop, optimizers
from .objective import Flow, Noised, noised
from .run import TrainingRun
from .vae import encode_all

NAME = "canny"
BLOCKS = 3
ENCODING = (0.5, 0.5, 1.0)
"""How the autoencoder takes edges: as of Large's net, whose structure this one has."""

# Of the transformer's configuration.
_SHARED = (
    "sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim",
    "num_attention_heads", "pooled_projection_dim",
)  # fmt: skip

_WITHOUT_CAPTION = 0.1
_DATA = "edges.npz"


@dataclass(frozen=True)
class Inputs:
    """What a net is trained on, a row an example.

    Attributes:
        latents: of the pictures, [n, 16, h, w].
        hints: latents of their edges, [n, 16, h, w].
        prompts, pooled: of the captions, [n + 1, L, T5] and [n + 1, P]; the last are of none.
    """

    latents: Tensor
    hints: Tensor
    prompts: Tensor
    pooled: Tensor

    def batch(self, rows: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, hints, prompts and pooled, float32, of some rows."""
        latents, hints = self.latents[rows].float(), self.hints[rows].float()
        return latents, hints, self.prompts[captions].float(), self.pooled[captions].float()


def net_config(transformer: SD3Transformer2DModel) -> dict:
    """Arguments of :class:`diffusers.SD3ControlNetModel` for a net as those of Large.

    It has no text stream and the transformer's embedding of patches.
    """
    return {name: transformer.config[name] for name in _SHARED} | {
        "num_layers": BLOCKS,
        "joint_attention_dim": None,
        "caption_projection_dim": None,
        "pos_embed_max_size": None,
        "pos_embed_type": None,
        "use_pos_embed": False,
        "force_zeros_for_pooled_projection": False,
    }


def new_net(transformer: SD3Transformer2DModel) -> SD3ControlNetModel:
    """A net that changes nothing yet: each block begins as the identity, its outputs as zero."""
    net = SD3ControlNetModel(**net_config(transformer))
    net.time_text_embed.load_state_dict(transformer.time_text_embed.state_dict())
    for name, module in net.transformer_blocks.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("norm1.linear"):
                nn.init.zeros_(module.weight)
    return net


class Steered(nn.Module):
    """The error of a transformer's velocity where a net steers it."""

    def __init__(self, transformer: SD3Transformer2DModel, net: SD3ControlNetModel) -> None:
        super().__init__()
        self.transformer, self.net = transformer, net

    def forward(
        self, own: Noised, hints: Tensor, prompts: Tensor, pooled: Tensor, scale: float = 1.0
    ) -> Tensor:
        """Mean squared error (scalar).

        Args:
            own: the latents.
            hints: [n, 16, h, w].
            prompts: [n, L, T5].
            pooled: [n, P].
            scale: of what the net makes; at 0 the transformer is alone.
        """
        (residuals,) = self.net(
            self.transformer.pos_embed(own.latents),
            hints,
            scale,
            pooled_projections=pooled,
            timestep=own.timestep,
            return_dict=False,
        )
        (velocity,) = self.transformer(
            own.latents, prompts, pooled, own.timestep, residuals, return_dict=False
        )
        return F.mse_loss(velocity.float(), own.velocity)


@torch.no_grad()
def encode_captions(
    flow: Flow, table: batches.Table, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts and pooled of :class:`Inputs`, in BF16."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    empty = (getattr(flow, f"empty_{index}").cpu() for index in range(len(names)))
    ids = [
        torch.cat([torch.from_numpy(table[name]).long(), none])
        for name, none in zip(names, empty, strict=True)
    ]
    prompts, pooled = [], []
    for part in zip(*(column.split(512) for column in ids), strict=True):
        every = torch.ones(len(part[0]), device=device)
        prompt, own, _ = flow.encode([tokens.to(device) for tokens in part], [every] * len(names))
        prompts.append(prompt.bfloat16())
        pooled.append(own.bfloat16())
    return torch.cat(prompts), torch.cat(pooled)


def encode_edges(vae: AutoencoderKL, edges: Tensor, device: torch.device) -> Tensor:
    """Hints of :class:`Inputs` of edges uint8 [n, SIZE² / 8]."""
    parts = (encode_hints(vae, pictures_of(own.numpy()), ENCODING) for own in edges.split(256))
    return torch.cat([part.to(device) for part in parts])


def encode(pipe: StableDiffusion3Pipeline, table: batches.Table, device: torch.device) -> Inputs:
    """What a net is trained on, of a table that :func:`~mini.training.edges.read_edges` gives."""
    latents = encode_all(
        pipe.vae, table, device, min(512, len(table["background"])), compiled=False
    )
    pipe.vae.to(memory_format=torch.contiguous_format)
    hints = encode_edges(pipe.vae, torch.from_numpy(table["edges"]), device)
    return Inputs(latents, hints, *encode_captions(Flow(pipe).eval(), table, device))


class Looks:
    """The error of a fixed batch that is not trained on, with a net and without."""

    def __init__(self, steered: Steered, inputs: Inputs, rows: Tensor) -> None:
        own, *self.rest = inputs.batch(rows, rows)
        self.steered, self.own = steered, noised(own)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        with autocast(self.own.latents.device):
            return {
                "aside": float(self.steered(self.own, *self.rest)),
                "without": float(self.steered(self.own, *self.rest, scale=0.0)),
            }


def train(
    run: TrainingRun, table: batches.Table, batch: int, peak: float, compiled: bool, every: float
) -> Path:
    """Train a net; what it leaves is the average of its weights.

    Args:
        table: of :func:`~mini.training.edges.read_edges`; the last batch is looked at alone.
        every: seconds between two looks.

    Returns:
        Its folder.
    """
    device, number = run.device, len(table["background"]) - batch
    pipe = load(checkpoint_path(), str(device))
    inputs = encode(pipe, table, device)
    torch.manual_seed(run.seed)
    transformer = pipe.transformer.requires_grad_(False)
    net = new_net(transformer).to(device).train()
    average = Average({"net": net}, 0.998)
    steered, averaged = (Steered(transformer, own) for own in (net, average.modules["net"]))
    hidden = [m.weight for m in net.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    methods = optimizers(net.parameters(), peak, 0.01, device, hidden)
    look = Looks(averaged, inputs, torch.arange(number, number + batch, device=device))

    def losses() -> dict[str, Tensor]:
        rows = torch.randint(number, (batch,), device=device)
        without = torch.rand(batch, device=device) < _WITHOUT_CAPTION
        latents, *rest = inputs.batch(rows, rows.masked_fill(without, number + batch))
        with autocast(device):
            return {"total": steered(noised(latents), *rest)}

    if compiled:
        for block in (*transformer.transformer_blocks, *net.transformer_blocks):
            block.compile()  # equal blocks share the compiled code
    run.log(**look())
    step = gradients(losses, methods, graph=compiled and device.type == "cuda")
    loop(run, methods, peak, step, average, (every, look))
    run.log(**look())
    return save_net(average.modules["net"], run.out / NAME)


def save_net(net: nn.Module, folder: Path) -> Path:
    """Save a net as diffusers does, in FP16."""
    copy.deepcopy(net).half().save_pretrained(folder)  # type: ignore[operator]
    return folder


@click.command()
@click.argument("stage", type=click.Choice(["data", "train", "all"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--threads", type=int, help="Of the CPU. Default: PyTorch's.")
@click.option("--examples", "number", default=80_000, show_default=True, help="Scenes of `data`.")
@click.option("--workers", default=os.cpu_count(), help="Processes that write captions.")
@click.option("--steps", default=8000, show_default=True)
@click.option("--minutes", type=float, help="To train for, in place of --steps.")
@click.option("--batch", default=256, show_default=True)
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--look-every", default=30.0, show_default=True, help="Seconds between evaluations.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    stage: str,
    out: Path,
    device: str,
    threads: int | None,
    number: int,
    workers: int,
    steps: int,
    minutes: float | None,
    batch: int,
    lr: float,
    look_every: float,
    compiled: bool,
    seed: int,
) -> None:
    """Train mini's ControlNet. `all` runs data and train one after the other.

    OUT/log.jsonl tells how it went: the error of examples that are not trained on, with the net
    and without.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if threads:
        torch.set_num_threads(threads)
    if stage in ("data", "all"):
        write_edges(out / _DATA, number, workers)
    if stage in ("train", "all"):
        budget = math.inf if minutes is None else 60 * minutes
        limit = steps if minutes is None else None
        run = TrainingRun(NAME, out, torch.device(device), budget, math.inf, seed, steps=limit)
        table = read_edges(out / _DATA)
        folder = train(run, table, batch, lr, compiled and device != "cpu", look_every)
        size = sum(file.stat().st_size for file in folder.iterdir())
        click.echo(f"{folder}  {size / 1e6:.2f} MB after {run.step} steps")


if __name__ == "__main__":
    main()
