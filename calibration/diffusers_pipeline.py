"""A diffusers pipeline from the parts of a checkpoint, in whatever files they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sd35_trt.checkpoints.controlnets import part_source
from sd35_trt.formats.bundle import Scheduler

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from sd35_trt.checkpoints.merged import AnyCheckpoint

_TOKENIZERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}


class Source(Protocol):
    """A checkpoint with diffusers' names and configurations."""

    def config(self, part: str) -> dict[str, Any]:
        """Of a part, as in its ``config.json``."""

    def weights(self, part: str) -> Any:
        """Has ``read(name)``, which gives a tensor."""

    def tokenizer(self, folder: str) -> Path:
        """The directory of a tokenizer."""


def diffusers_scheduler(scheduler: Scheduler) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' object for a scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=scheduler.shift, num_train_timesteps=int(scheduler.num_train_timesteps)
    )


def assemble(
    source: Source, scheduler: Scheduler, parts: Sequence[str], dtype: torch.dtype
) -> StableDiffusion3Pipeline:
    """A pipeline with these parts alone, on the CPU.

    A tensor that is stored in ``dtype`` stays a view of its file.

    Raises:
        CheckpointError: a tensor or a tokenizer is missing.
    """
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    modules: dict[str, Any] = {"transformer": None, "vae": None}
    for part, folder in _TOKENIZERS.items():
        kind = T5TokenizerFast if part == "text_encoder_3" else CLIPTokenizer
        modules[part] = modules[folder] = None
        if part in parts:
            modules[folder] = kind.from_pretrained(source.tokenizer(folder))
    modules |= {part: _model(source, part, dtype) for part in parts}
    return StableDiffusion3Pipeline(scheduler=diffusers_scheduler(scheduler), **modules)


def control_net(source: AnyCheckpoint, part: str, dtype: torch.dtype) -> Any:
    """A ControlNet, with the transformer's embedding of patches where it has none of its own.

    Raises:
        CheckpointError: a tensor is missing.
    """
    from diffusers import SD3ControlNetModel

    config, weights = part_source(source, part)
    if weights is None:
        raise TypeError(f"{source.root} has no tensors")
    # The size that a net was trained at is of no effect on what it computes.
    own = {**config, "sample_size": config["patch_size"]}
    with torch.device("meta"):
        model = SD3ControlNetModel(**own)
    state = {name: weights.read(name).to(dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _model(source: Source, part: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    config, weights = source.config(part), source.weights(part)
    with torch.device("meta"):
        if part in ("transformer", "vae"):
            kind = SD3Transformer2DModel if part == "transformer" else AutoencoderKL
            model = kind(**config)
        elif part == "text_encoder_3":
            model = T5EncoderModel(T5Config(**config))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    # T5's embedding is tied: one name of the two is enough.
    names = [name for name in model.state_dict() if name != "encoder.embed_tokens.weight"]
    state = {name: weights.read(name).to(dtype) for name in names}
    if part in ("transformer", "vae"):
        model.load_state_dict(state, assign=True)
        return model.eval()
    # Makes the buffers that are in no file, too.
    model = type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=dtype)
    return model.eval()
