"""Trains mini from nothing: the VAE, then the text encoders and the MMDiT jointly.

    python -m mini.training.train all --out out/mini

Each stage runs for a budget of minutes, to whose end the learning rate decays, and can be cut:
with ``--stop-after`` it saves its state and the same command takes it up again. Everything random
follows from ``--seed``, though the number of steps depends on the machine's speed.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd35_trt.mini.scoring import GUIDANCE, heldout, score
from sd35_trt.quality.evaluate import draw

from . import batches
from .model import build_pipeline, save_pipeline, start_at_zero
from .muon import Muon
from .objective import Objective

Optimizers = list[torch.optim.Optimizer]

_TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class Run:
    """One stage under way: its folder, device, budget in seconds and position."""

    name: str
    out: Path
    device: torch.device
    budget: float
    stop_after: float
    seed: int
    step: int = 0
    spent: float = 0.0
    """Seconds of the budget used in earlier pieces and this one."""
    started: float = field(default_factory=time.monotonic)
    before: float = 0.0

    def restore(self, modules: dict[str, nn.Module], optimizers: Optimizers) -> bool:
        """Take up a saved state. Returns whether there was one."""
        path = self.out / f"{self.name}.state"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.before = state["step"], state["spent"]
        self.spent = self.before
        return True

    def save(self, modules: dict[str, nn.Module], optimizers: Optimizers) -> None:
        """Save the state, beside the final name first."""
        path = self.out / f"{self.name}.state"
        partial = path.with_suffix(".partial")
        state = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, partial)
        partial.rename(path)

    def tick(self) -> None:
        """Advance the clock."""
        self.spent = self.before + time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Share of the budget used, 0..1."""
        return min(self.spent / self.budget, 1.0)

    @property
    def over(self) -> bool:
        """Whether this piece has to end."""
        return self.spent >= self.budget or self.spent - self.before >= self.stop_after

    def log(self, **figures: float) -> None:
        """Append a line to ``log.jsonl``."""
        row = {"stage": self.name, "step": self.step, "seconds": round(self.spent, 1)}
        row |= {name: round(float(value), 6) for name, value in figures.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")


def rate(share: float, step: int, warmup: int = 300, decay: float = 0.35) -> float:
    """Factor on the learning rate: a linear start, a plateau, a linear end to zero."""
    return min((step + 1) / warmup, 1.0) * min((1 - share) / decay, 1.0)


class Average:
    """Exponential moving average of modules' weights, kept in copies of them."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules = {
            n: copy.deepcopy(m).eval().requires_grad_(False) for n, m in modules.items()
        }
        self.decay = decay
        self.into: list[Tensor] = [p for m in self.modules.values() for p in m.parameters()]
        self.source: list[Tensor] = [p for m in modules.values() for p in m.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the present weights; quickly during the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.into, [p.detach() for p in self.source], 1 - decay)


def _autocast(device: torch.device) -> torch.autocast:
    # Without its cache: weights cast once would be stale in a replayed graph.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def _optimizers(
    parameters: Iterable[nn.Parameter],
    lr: float,
    decay: float,
    device: torch.device,
    hidden: Iterable[Tensor] = (),
) -> Optimizers:
    """AdamW, and Muon for the matrices in ``hidden``."""
    matrices = {id(p): p for p in hidden}
    others = [p for p in parameters if id(p) not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type == "cuda"
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.97), fused=fused)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices.values(), lr, decay)]


def _hidden(objective: Objective) -> list[Tensor]:
    """Weights of the linear layers between embeddings and heads."""
    stacks = (
        objective.transformer.transformer_blocks,
        objective.text_encoder_3.encoder.block,
        *(m.text_model.encoder for m in (objective.text_encoder, objective.text_encoder_2)),
    )
    return [
        layer.weight
        for stack in stacks
        for layer in stack.modules()
        if isinstance(layer, nn.Linear)
    ]


Step = Callable[[], dict[str, Tensor]]


def _gradients(losses: Step, optimizers: Optimizers, graph: bool) -> Step:
    """``losses`` followed by their backward pass; leaves fresh gradients at each call.

    Args:
        graph: replay it all as one CUDA graph, since launching kernels one by one would leave
            the GPU idle half of the time.
    """

    def eager() -> dict[str, Tensor]:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        found = losses()
        found["total"].backward()
        return found

    eager()  # compiles
    if not graph:
        return eager
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(aside)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = losses()
        found["total"].backward()

    def replay() -> dict[str, Tensor]:
        captured.replay()
        return found

    return replay


def _loop(
    run: Run,
    optimizers: Optimizers,
    peak: float,
    step: Step,
    average: Average,
    every: tuple[float, Callable[[], dict[str, float]]] | None = None,
) -> None:
    """Optimize until the piece is over. ``step`` leaves gradients and returns the losses."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    sums: dict[str, Tensor] = {}
    counted, shown = 0, run.spent
    looked = run.spent
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        bar = progress.add_task(run.name, total=run.budget, loss="")
        run.started, run.before = time.monotonic(), run.spent
        while not run.over:
            for group in groups:
                group["lr"] = peak * rate(run.share, run.step)
            losses = step()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average.update(run.step)
            for name, value in (losses | {"norm": norm}).items():
                sums[name] = sums.get(name, torch.zeros((), device=run.device)) + value.detach()
            run.step, counted = run.step + 1, counted + 1
            run.tick()
            if run.step % 50 == 0 or run.over:
                means = {name: float(value) / counted for name, value in sums.items()}
                if not math.isfinite(means["total"]):
                    raise click.ClickException(f"{run.name}: loss is not finite at step {run.step}")
                run.tick()
                speed = counted / max(run.spent - shown, 1e-6)
                run.log(**means, lr=groups[0]["lr"], steps_per_second=speed)
                text = " ".join(f"{k} {v:.4f}" for k, v in means.items()) + f" {speed:.1f}/s"
                progress.update(bar, completed=run.spent, loss=text)
                sums, counted, shown = {}, 0, run.spent
            if every and (run.spent - looked >= every[0]):
                run.log(**every[1]())
                run.tick()
                looked = shown = run.spent


# ------------------------------------------------------------------------------------ data


def make_data(out: Path, number: int, workers: int) -> None:
    """Write the tables of the first ``number`` training examples to ``out/data``."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _start(out, 0)
    for index, table in enumerate(batches.tables(number, checkpoint, workers)):
        partial = folder / f"{index:04}.partial"
        save_file({name: torch.from_numpy(column) for name, column in table.items()}, partial)
        partial.rename(folder / f"{index:04}.safetensors")
    (folder / "done").write_text(f"{number}\n")


def _load_data(out: Path, least: int = 0, patience: float = 300) -> batches.Table:
    """The tables in ``out/data``: all once they are done, or as soon as there are enough rows.

    ``train data`` may still be writing them; after ``patience`` seconds without a new one, or
    where it never ran, this fails.
    """
    folder = out / "data"
    seen, since = -1, time.monotonic()
    while True:
        done = (folder / "done").exists()
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != seen:
            seen, since = len(paths), time.monotonic()
            parts = [load_file(path) for path in paths]
            rows = sum(len(part["background"]) for part in parts)
        if paths and (done or (least and rows >= least)):
            return batches.join([{k: v.numpy() for k, v in part.items()} for part in parts])
        if not folder.exists() or time.monotonic() - since > patience:
            raise click.ClickException(
                f"no training data in {folder}; "
                f"make it with: python -m mini.training.train data --out {out}"
            )
        time.sleep(1)


def _start(out: Path, seed: int) -> Path:
    """The untrained pipeline of this run, saved once."""
    start = out / "start"
    if not start.exists():
        partial = out / f"start.{os.getpid()}"
        pipe = build_pipeline(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start_at_zero(pipe.transformer)
        save_pipeline(pipe, partial)
        partial.rename(start)
    return start


# ------------------------------------------------------------------------------------- VAE


def train_vae(run: Run, batch: int, least: int, compiled: bool) -> None:
    """Train the autoencoder; leaves ``out/vae`` with its latent factors set."""
    device = run.device
    pipe = StableDiffusion3Pipeline.from_pretrained(_start(run.out, run.seed))
    vae = pipe.vae.to(device, memory_format=torch.channels_last).train()
    data = _load_data(run.out, least)
    things = torch.from_numpy(data["things"]).to(device)
    background = torch.from_numpy(data["background"]).to(device)
    renderer = batches.Renderer(device)
    # With this weight of the mean KL term the error settles near -10 log10(6 * weight / 4) dB:
    # well above 30 dB, and no more bits in the latents than that takes.
    kl_weight = 2e-4

    def forward(pictures: Tensor) -> tuple[Tensor, Tensor]:
        with _autocast(device):
            law = vae.encode(pictures).latent_dist
            mean, log_variance = law.mean.float(), law.logvar.float()
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            back = vae.decode(latents).sample.float()
        error = F.mse_loss(back, pictures) + 0.02 * F.l1_loss(back, pictures)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error, kl

    step_forward = torch.compile(forward) if compiled else forward
    optimizers = _optimizers(vae.parameters(), 1e-3, 0.0, device)
    average = Average({"vae": vae}, 0.998)
    modules: dict[str, nn.Module] = {"vae": vae, "average": average.modules["vae"]}
    run.restore(modules, optimizers)
    torch.manual_seed(run.seed + run.step)

    def losses() -> dict[str, Tensor]:
        rows = torch.randint(len(things), (batch,), device=device)
        pictures = renderer(things[rows], background[rows]).contiguous(
            memory_format=torch.channels_last
        )
        error, kl = step_forward(pictures)
        return {"total": error + kl_weight * kl, "error": error.detach(), "kl": kl.detach()}

    _loop(run, optimizers, 1.5e-3, _gradients(losses, optimizers, graph=False), average)
    run.save(modules, optimizers)

    trained = average.modules["vae"]
    assert isinstance(trained, AutoencoderKL)
    rows = torch.arange(min(1024, len(things)), device=device)
    means, psnr = [], []
    with torch.no_grad():
        for part in rows.split(128):
            pictures = renderer(things[part], background[part])
            mean = trained.encode(pictures).latent_dist.mean
            back = trained.decode(mean).sample.clamp(-1, 1)
            psnr.append(-10 * torch.log10(((back - pictures) / 2).square().mean((1, 2, 3))))
            means.append(mean)
    latents = torch.cat(means)
    trained.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 4),
        shift_factor=round(float(latents.mean()), 4),
    )
    by_channel = latents.std((0, 2, 3)).sort().values
    print("latent std by channel", [round(float(s), 3) for s in by_channel])
    run.log(psnr=float(torch.cat(psnr).mean()), least_psnr=float(torch.cat(psnr).min()))
    trained.save_pretrained(run.out / "vae")


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, data: batches.Table, device: torch.device, batch: int, compiled: bool
) -> Tensor:
    """Latents of every row, normalized as the pipeline has them; BF16 [n, 16, h, w]."""
    renderer = batches.Renderer(device)
    vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor

    def forward(pictures: Tensor) -> Tensor:
        with _autocast(device):
            return (vae.encode(pictures).latent_dist.mean.float() - shift) * scale

    run = torch.compile(forward) if compiled else forward
    things, background = torch.from_numpy(data["things"]), torch.from_numpy(data["background"])
    latents = None
    for first in range(0, len(things), batch):
        # The last batch overlaps the one before it, so that all have one shape.
        part = slice(max(min(first, len(things) - batch), 0), first + batch)
        pictures = renderer(things[part].to(device), background[part].to(device))
        out = run(pictures.contiguous(memory_format=torch.channels_last)).bfloat16()
        if latents is None:
            latents = torch.empty(len(things), *out.shape[1:], dtype=torch.bfloat16, device=device)
        latents[part] = out
    assert latents is not None
    return latents


# ----------------------------------------------------------------------------------- joint


def train_joint(
    run: Run,
    batch: int,
    peak: float,
    compiled: bool,
    look_every: float,
    look_at: int,
) -> None:
    """Train text encoders and MMDiT; leaves ``out/checkpoint``, the averaged weights."""
    device = run.device
    pipe = StableDiffusion3Pipeline.from_pretrained(_start(run.out, run.seed))
    pipe.vae = AutoencoderKL.from_pretrained(run.out / "vae")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    data = _load_data(run.out)
    latents = encode_all(pipe.vae, data, device, min(512, len(data["background"])), compiled)
    pipe.vae.to(memory_format=torch.contiguous_format)
    tables = {name: torch.from_numpy(column).to(device) for name, column in data.items()}
    torch.manual_seed(run.seed)
    objective = Objective(pipe).to(device).train()
    trained = {name: getattr(objective, name) for name in _TRAINED}
    average = Average(trained, 0.9985)
    if compiled:
        for block in objective.transformer.transformer_blocks:
            block.compile()  # equal blocks share the compiled code
        for name in _TRAINED[1:]:
            getattr(objective, name).compile()
    optimizers = _optimizers(objective.parameters(), peak, 0.02, device, _hidden(objective))
    averaged = {f"average_{name}": module for name, module in average.modules.items()}
    modules: dict[str, nn.Module] = {"objective": objective, **averaged}
    run.restore(modules, optimizers)
    torch.manual_seed(run.seed + run.step + 1)
    drawer = StableDiffusion3Pipeline(
        **{**pipe.components, **average.modules}  # the EMA weights draw
    )
    drawer.set_progress_bar_config(disable=True)

    def losses() -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (batch,), device=device)
        with _autocast(device):
            return objective(
                latents[rows].float(), {name: column[rows] for name, column in tables.items()}
            )

    def look() -> dict[str, float]:
        examples = heldout(look_at, first=1_000_000)
        state = torch.random.get_rng_state()
        images = draw(drawer, [e.caption for e in examples], steps=14, guidance=GUIDANCE)
        torch.random.set_rng_state(state)
        result = score(images, examples)
        save_pipeline(copy.deepcopy(drawer).to("cpu"), run.out / "checkpoint")
        return {"attributes": result.attribute_accuracy, "whole": result.whole_scene_accuracy}

    step = _gradients(losses, optimizers, graph=compiled and device.type == "cuda")
    _loop(run, optimizers, peak, step, average, (look_every, look) if look_at else None)
    run.save(modules, optimizers)
    save_pipeline(copy.deepcopy(drawer).to("cpu"), run.out / "checkpoint")


def plot(out: Path, image: Path) -> None:
    """Plot losses and accuracy over the minutes of each stage from ``out/log.jsonl``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    panels: list[tuple[str, str, dict[str, str], bool]] = [
        ("VAE", "vae", {"error": "reconstruction error"}, True),
        (
            "Text encoders and MMDiT",
            "joint",
            {"flow": "flow loss", "reading": "reading loss", "layout": "layout loss"},
            True,
        ),
        (
            "Held-out captions",
            "joint",
            {"attributes": "attributes", "whole": "whole scenes"},
            False,
        ),
    ]
    panels = [panel for panel in panels if any(row["stage"] == panel[1] for row in rows)]
    size = (4.4 * len(panels), 3.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (title, stage, names, logarithmic) in zip(np.atleast_1d(axes), panels, strict=True):
        for name, label in names.items():
            points = [
                (r["seconds"] / 60, r[name]) for r in rows if r["stage"] == stage and name in r
            ]
            axis.plot(*np.array(points).reshape(-1, 2).T, label=label)
        axis.set(title=title, xlabel="minutes")
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(image, dpi=110)


# ----------------------------------------------------------------------------- command line


@click.command()
@click.argument("stage", type=click.Choice(["data", "vae", "joint", "plot", "all"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--examples", default=1_000_000, show_default=True, help="Captions to train on.")
@click.option("--workers", default=os.cpu_count(), help="Processes that write captions.")
@click.option("--vae-minutes", default=1.8, show_default=True)
@click.option("--joint-minutes", default=11.6, show_default=True)
@click.option("--stop-after", default=math.inf, help="Seconds after which to save and stop.")
@click.option("--vae-batch", default=256, show_default=True)
@click.option("--batch", default=1024, show_default=True)
@click.option(
    "--lr", default=3e-3, show_default=True, help="Peak learning rate of the joint stage."
)
@click.option("--look-every", default=150.0, show_default=True, help="Seconds between evaluations.")
@click.option("--look-at", default=128, show_default=True, help="Captions of one evaluation.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Train this diffusers directory on; its VAE stays as it is.",
)
def main(
    stage: str,
    out: Path,
    device: str,
    examples: int,
    workers: int,
    vae_minutes: float,
    joint_minutes: float,
    stop_after: float,
    vae_batch: int,
    batch: int,
    lr: float,
    look_every: float,
    look_at: int,
    compiled: bool,
    seed: int,
    start: Path | None,
) -> None:
    """Train mini. `all` runs data, vae, joint and plot one after the other.

    The result is OUT/checkpoint, a diffusers directory; OUT/log.jsonl and OUT/curve.png tell
    how it went.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")

    def run(name: str, minutes: float) -> Run:
        return Run(name, out, torch.device(device), 60 * minutes, stop_after, seed)

    if start and not (out / "start").exists():
        shutil.copytree(start, out / "start")
        shutil.copytree(start / "vae", out / "vae")
    if stage in ("data", "all"):
        make_data(out, examples, workers)
    if stage == "vae" or (stage == "all" and not start):
        train_vae(run("vae", vae_minutes), vae_batch, min(examples, 100_000), compiled)
    if stage in ("joint", "all"):
        train_joint(run("joint", joint_minutes), batch, lr, compiled, look_every, look_at)
    if stage in ("plot", "all"):
        plot(out, out / "curve.png")


if __name__ == "__main__":
    main()
