"""Trains the text encoders and the MMDiT jointly."""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from sd35_trt.mini.scoring import GUIDANCE, heldout, score
from sd35_trt.quality.evaluate import draw

from .data import load_data, start_pipeline
from .loop import Average, autocast, gradients, loop, optimizers
from .model import save_pipeline
from .objective import Objective
from .run import TrainingRun
from .vae import encode_all

_TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


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


def train_joint(
    run: TrainingRun,
    batch: int,
    peak: float,
    compiled: bool,
    look_every: float,
    look_at: int,
) -> None:
    """Train text encoders and MMDiT; leaves ``out/checkpoint``, the averaged weights."""
    device = run.device
    pipe = StableDiffusion3Pipeline.from_pretrained(start_pipeline(run.out, run.seed))
    pipe.vae = AutoencoderKL.from_pretrained(run.out / "vae")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    data = load_data(run.out)
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
    methods = optimizers(objective.parameters(), peak, 0.02, device, _hidden(objective))
    averaged = {f"average_{name}": module for name, module in average.modules.items()}
    modules: dict[str, nn.Module] = {"objective": objective, **averaged}
    run.restore(modules, methods)
    torch.manual_seed(run.seed + run.step + 1)
    drawer = StableDiffusion3Pipeline(
        **{**pipe.components, **average.modules}  # the EMA weights draw
    )
    drawer.set_progress_bar_config(disable=True)

    def losses() -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (batch,), device=device)
        with autocast(device):
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

    step = gradients(losses, methods, graph=compiled and device.type == "cuda")
    loop(run, methods, peak, step, average, (look_every, look) if look_at else None)
    run.save(modules, methods)
    save_pipeline(copy.deepcopy(drawer).to("cpu"), run.out / "checkpoint")
