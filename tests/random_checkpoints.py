"""Random checkpoints of SD3.5's structures at a fraction of its size, for the tests."""

from __future__ import annotations

import copy
import functools
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as Diffusers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mini.training.model import build_pipeline
from sd35_trt.mini import checkpoint_path
from sd35_trt.store.cache import StageCache
from sd35_trt.store.code import code_digest

#: As SD3.5's tokenizers.
CLIP_TOKENS, T5_TOKENS = 77, 512

_TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 256,
    "qk_norm": "rms_norm",
}

STRUCTURES: dict[str, dict[str, Any]] = {
    # Large and Large-Turbo: one joint attention per block.
    "large": {"num_layers": 3, "num_attention_heads": 3, "caption_projection_dim": 192,
              "pos_embed_max_size": 24},
    # Medium: leading blocks with a second, image-only attention, and a larger position table.
    "medium": {"num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128,
               "pos_embed_max_size": 48, "dual_attention_layers": (0, 1)},
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is stored."""

    dtype: torch.dtype = torch.float32
    shard: str = "10GB"
    t5: bool = True
    #: What shapes do not show is as in the published models: heads of CLIP, the autoencoder's
    #: groups and factors, and CLIP-L's projection, the identity.
    published: bool = False


_VAE: dict[str, Any] = {
    "latent_channels": 16, "block_out_channels": (32, 32, 64, 96), "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


@functools.cache
def _untrained() -> Diffusers:
    """What checkpoints take their tokenizers and autoencoder from; they change copies of it."""
    pipe = build_pipeline(seed=0)
    # As mini's, so that builds share the graphs of its autoencoder.
    latents = AutoencoderKL.load_config(checkpoint_path() / "vae")
    pipe.vae.register_to_config(**{k: latents[k] for k in ("scaling_factor", "shift_factor")})
    return pipe


def write_checkpoint(root: Path, structure: str, layout: Layout | None = None) -> Path:
    """Save a random pipeline; the same arguments give the same bytes.

    The text encoders and the autoencoder are the same for every structure, so that builds share
    their stages.
    """
    layout = layout or Layout()
    pipe = copy.deepcopy(_untrained())
    torch.manual_seed(1)
    texts = {"vocab_size": len(pipe.tokenizer), "max_position_embeddings": CLIP_TOKENS,
             "num_hidden_layers": 3, "eos_token_id": 2}  # fmt: skip
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, projection_dim=width,
                           num_attention_heads=width // 64 if layout.published else 2,
                           hidden_act=act, **texts)
        )
        for width, act in ((128 if layout.published else 96, "quick_gelu"), (64, "gelu"))
    ]  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(pipe.tokenizer_3), d_model=256, d_kv=64, d_ff=128, num_layers=2,
                 num_heads=4, feed_forward_proj="gated-gelu")
    )  # fmt: skip
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = CLIP_TOKENS
    pipe.tokenizer_3.model_max_length = T5_TOKENS
    pooled = sum(clip.config.projection_dim for clip in clips)
    transformer = SD3Transformer2DModel(
        **_TRANSFORMER, pooled_projection_dim=pooled, **STRUCTURES[structure]
    )
    # Freshly initialised biases are zero; real ones are not.
    for model in (transformer, *clips):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.05)
    if layout.published:
        torch.nn.init.eye_(clips[0].text_projection.weight)
        pipe.vae = AutoencoderKL(**_VAE)
    diffusers_pipeline = Diffusers(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=pipe.vae,
        text_encoder=clips[0].eval(),
        tokenizer=pipe.tokenizer,
        text_encoder_2=clips[1].eval(),
        tokenizer_2=pipe.tokenizer_2,
        text_encoder_3=t5.eval() if layout.t5 else None,
        tokenizer_3=pipe.tokenizer_3 if layout.t5 else None,
    )
    diffusers_pipeline.to(dtype=layout.dtype)
    diffusers_pipeline.save_pretrained(root, max_shard_size=layout.shard)
    return root


def kept_checkpoint(cache: StageCache, structure: str, layout: Layout | None = None) -> Path:
    """As :func:`write_checkpoint`, from a cache if it is there; never write to it."""
    layout = layout or Layout()
    inputs = {
        "structure": structure,
        "layout": repr(layout),
        "code": code_digest(__name__, "mini.training.model"),
        "versions": {n: version(n) for n in ("torch", "diffusers", "transformers", "tokenizers")},
    }
    kind, key = "checkpoint", cache.key(inputs)
    with cache.lock(kind, key, lambda: None):
        if cache.find(kind, key) is None:
            with cache.create(kind, key) as work:
                write_checkpoint(work / structure, structure, layout)
    return cache.root / kind / key / structure


def damaged(root: Path, to: Path, part: str, tensor: str, value: float) -> Path:
    """A copy of a checkpoint with one value replaced in a tensor."""
    shutil.copytree(root, to)
    (path,) = (to / part).glob("*.safetensors")
    tensors = load_file(path)
    tensors[tensor].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return to
