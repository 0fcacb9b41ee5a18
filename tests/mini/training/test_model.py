import json
from itertools import count, islice

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mini.training import model
from sd35_trt.mini import checkpoint_path
from sd35_trt.mini.scenes import sample
from sd35_trt.mini.scoring import heldout
from sd35_trt.quality import evaluate


@pytest.fixture(scope="module")
def pipe():
    return evaluate.load(checkpoint_path())


@pytest.mark.nightly
def test_the_checkpoint_draws_what_captions_say(pipe):
    examples = heldout(20)
    assert len({tag for e in examples for tag in e.tags}) == 7  # every kind of caption
    images = evaluate.draw(pipe, [e.caption for e in examples], batch=10)
    assert images.shape == (20, 128, 128, 3)
    verdicts = evaluate.score(images, examples).verdicts
    assert sum(v.whole for v in verdicts) >= 17


def test_the_autoencoder_keeps_30_decibels(pipe):
    from sd35_trt.mini.rendering import render

    scenes = islice((sample(seed, "heldout").scene for seed in count()), 8)
    pictures = torch.tensor(np.stack([render(scene) for scene in scenes])) / 127.5 - 1
    pictures = pictures.permute(0, 3, 1, 2)
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    errors = ((back - pictures) / 2).square().mean((1, 2, 3))
    assert float(-10 * torch.log10(errors).mean()) >= 30


def test_latents_have_unit_scale(pipe):
    from sd35_trt.mini.rendering import render

    scenes = islice((sample(seed).scene for seed in count()), 16)
    pictures = torch.tensor(np.stack([render(scene) for scene in scenes])) / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pictures.permute(0, 3, 1, 2)).latent_dist.mean
    latents = (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, abs=0.15)


def test_other_sizes_can_be_drawn(pipe):
    out = pipe(
        "a red circle",
        height=192,
        width=128,
        num_inference_steps=2,
        max_sequence_length=32,
        output_type="np",
    )
    assert out.images.shape == (1, 192, 128, 3)


def test_the_architecture_is_that_of_sd35(pipe):
    config = pipe.transformer.config
    assert config.qk_norm == "rms_norm"
    assert (config.patch_size, config.in_channels, config.attention_head_dim) == (2, 16, 64)
    assert pipe.transformer.transformer_blocks[-1].context_pre_only
    widths = [e.config.hidden_size for e in (pipe.text_encoder, pipe.text_encoder_2)]
    assert config.pooled_projection_dim == sum(widths)
    assert config.joint_attention_dim == pipe.text_encoder_3.config.d_model > sum(widths)
    assert [e.config.hidden_act for e in (pipe.text_encoder, pipe.text_encoder_2)] == [
        "quick_gelu",
        "gelu",
    ]
    assert pipe.text_encoder_3.config.is_gated_act
    assert not pipe.vae.config.use_quant_conv
    assert not pipe.vae.config.use_post_quant_conv
    assert pipe.vae_scale_factor == 8
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_3):
        assert part.dtype == torch.float32


def test_weights_are_small_half_precision_and_finite():
    files = sorted(checkpoint_path().rglob("*.safetensors"))
    assert len(files) == 5
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  a safe_open is no mapping
                tensor = tensors.get_tensor(name)
                assert tensor.dtype == torch.float16, name
                assert torch.isfinite(tensor).all(), name


@pytest.mark.nightly
def test_a_seed_fixes_the_random_weights_and_the_files_load(tmp_path):
    first, second = (model.build_pipeline(seed=4) for _ in range(2))
    for a, b in zip(first.transformer.parameters(), second.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
    model.save_pipeline(first, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["tokenizer_3"] == ["transformers", "T5TokenizerFast"]
    models = evaluate.load(tmp_path)
    expected = second.transformer.proj_out.weight.half().float()
    assert torch.equal(models.transformer.proj_out.weight, expected)


def test_training_starts_from_zero_velocity():
    transformer = model.SD3Transformer2DModel(**model.transformer_config())
    model.start_at_zero(transformer)
    with torch.no_grad():
        velocity = transformer(
            torch.randn(1, 16, 16, 16),
            encoder_hidden_states=torch.randn(1, 64, model.T5),
            pooled_projections=torch.randn(1, model.CLIP_L + model.CLIP_G),
            timestep=torch.tensor([500.0]),
        ).sample
    assert velocity.abs().max() == 0
