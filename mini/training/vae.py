"""Trains the autoencoder, and encodes the training pictures with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from . import batches
from .data import load_data, start_pipeline
from .loop import Average, autocast, gradients, loop, optimizers
from .run import TrainingRun


def train_vae(run: TrainingRun, batch: int, least: int, compiled: bool) -> None:
    """Train the autoencoder; leaves ``out/vae`` with its latent factors set."""
    device = run.device
    pipe = StableDiffusion3Pipeline.from_pretrained(start_pipeline(run.out, run.seed))
    vae = pipe.vae.to(device, memory_format=torch.channels_last).train()
    data = load_data(run.out, least)
    things = torch.from_numpy(data["things"]).to(device)
    background = torch.from_numpy(data["background"]).to(device)
    renderer = batches.SceneRenderer(device)
    # With this weight of the mean KL term the error settles near -10 log10(6 * weight / 4) dB:
    # well above 30 dB, and no more bits in the latents than that takes.
    kl_weight = 2e-4

    def forward(pictures: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(device):
            law = vae.encode(pictures).latent_dist
            mean, log_variance = law.mean.float(), law.logvar.float()
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            back = vae.decode(latents).sample.float()
        error = F.mse_loss(back, pictures) + 0.02 * F.l1_loss(back, pictures)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error, kl

    step_forward = torch.compile(forward) if compiled else forward
    methods = optimizers(vae.parameters(), 1e-3, 0.0, device)
    average = Average({"vae": vae}, 0.998)
    modules: dict[str, nn.Module] = {"vae": vae, "average": average.modules["vae"]}
    run.restore(modules, methods)
    torch.manual_seed(run.seed + run.step)

    def losses() -> dict[str, Tensor]:
        rows = torch.randint(len(things), (batch,), device=device)
        pictures = renderer(things[rows], background[rows]).contiguous(
            memory_format=torch.channels_last
        )
        error, kl = step_forward(pictures)
        return {"total": error + kl_weight * kl, "error": error.detach(), "kl": kl.detach()}

    loop(run, methods, 1.5e-3, gradients(losses, methods, graph=False), average)
    run.save(modules, methods)

    trained: Any = average.modules["vae"]
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
    renderer = batches.SceneRenderer(device)
    vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor

    def forward(pictures: Tensor) -> Tensor:
        with autocast(device):
            return (vae.encode(pictures).latent_dist.mean.float() - shift) * scale

    run = torch.compile(forward) if compiled else forward
    things, background = torch.from_numpy(data["things"]), torch.from_numpy(data["background"])
    latents = torch.empty(0)
    for first in range(0, len(things), batch):
        # The last batch overlaps the one before it, so that all have one shape.
        part = slice(max(min(first, len(things) - batch), 0), first + batch)
        pictures = renderer(things[part].to(device), background[part].to(device))
        out = run(pictures.contiguous(memory_format=torch.channels_last)).bfloat16()
        if first == 0:
            latents = torch.empty(len(things), *out.shape[1:], dtype=torch.bfloat16, device=device)
        latents[part] = out
    return latents
