"""mini's configuration: every part of SD3.5, in its classes, at about one thousandth of its size.

``python -m mini.training.model OUT_DIR`` saves a pipeline with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from sd35_trt.mini.world import SIZE

from . import tokenizers

LATENT_CHANNELS = 16
WIDTH, HEAD, LAYERS = 192, 64, 6
CLIP_L, CLIP_G, T5 = 64, 96, 256
"""Widths of the three text encoders. T5's exceeds the sum of the CLIPs', as in SD3.5."""


def transformer_config() -> dict:
    """Arguments of :class:`diffusers.SD3Transformer2DModel`."""
    return {
        "sample_size": SIZE // 8,
        "patch_size": 2,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": LAYERS,
        "attention_head_dim": HEAD,
        "num_attention_heads": WIDTH // HEAD,
        "joint_attention_dim": T5,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": CLIP_L + CLIP_G,
        # Three times the default side in patches, as in SD3.5: pictures up to 384 pixels.
        "pos_embed_max_size": 3 * SIZE // 16,
        "qk_norm": "rms_norm",
    }


def vae_config() -> dict:
    """Arguments of :class:`diffusers.AutoencoderKL`; training sets the two latent factors."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [32, 48, 64, 80],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "sample_size": SIZE,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


def clip_config(width: int, activation: str, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Configuration of one CLIP text encoder of the given width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizers.MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=0,
        # As in SD3.5's files: 2 makes transformers pool at the highest id, the end token.
        eos_token_id=2,
        pad_token_id=1,
    )


def t5_config(tokenizer: T5TokenizerFast) -> T5Config:
    """Configuration of the T5 encoder, of the v1.1 kind."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=T5,
        d_kv=32,
        d_ff=384,
        num_layers=4,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )


def build_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """The whole pipeline in FP32 with random weights that follow from the seed."""
    texts = tokenizers.captions()
    clip_tokenizer = tokenizers.build_clip(texts)
    second_clip_tokenizer = tokenizers.build_clip(texts, pad_token="!")
    t5_tokenizer = tokenizers.build_t5(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**transformer_config()),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(**vae_config()),
            text_encoder=CLIPTextModelWithProjection(
                clip_config(CLIP_L, "quick_gelu", clip_tokenizer)
            ).eval(),
            tokenizer=clip_tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(
                clip_config(CLIP_G, "gelu", second_clip_tokenizer)
            ).eval(),
            tokenizer_2=second_clip_tokenizer,
            text_encoder_3=T5EncoderModel(t5_config(t5_tokenizer)).eval(),
            tokenizer_3=t5_tokenizer,
        )


def start_at_zero(transformer: SD3Transformer2DModel) -> None:
    """Initialize for training as DiT does (https://arxiv.org/abs/2212.09748): each block starts
    as the identity and the velocity as zero. diffusers leaves PyTorch's defaults."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
            if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear")):
                torch.nn.init.zeros_(module.weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Save in the diffusers layout with FP16 weights. The pipeline itself becomes FP16."""
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizers.save_clip(getattr(pipe, name), folder / name)
    # diffusers notes where the weights were last; nobody else has that folder.
    for config in folder.glob("*/config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)
        config.write_text(json.dumps(entries, indent=2) + "\n")
    # Without this transformers 5 would load its parts in FP16 and diffusers the others in FP32.
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        config = folder / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    # transformers 5 renamed its fast tokenizer; this name loads in 4 and 5, and is SD3.5's.
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    index.write_text(json.dumps(entries, indent=2) + "\n")


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(out_dir: Path, seed: int) -> None:
    """Save a pipeline with random weights to OUT_DIR."""
    save_pipeline(build_pipeline(seed), out_dir)


if __name__ == "__main__":
    main()
