"""However a file spells CLIP's and T5's tensors, they are read as transformers reads them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from originals import PREFIXES, original, part_tensors, save, write_single
from random_checkpoints import Layout, kept_checkpoint
from safetensors.torch import load_file, save_file

from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.errors import CheckpointError
from sd35_trt.store.cache import StageCache

Tensors = dict[str, torch.Tensor]

CLIPS = ("text_encoder", "text_encoder_2")
FILES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl_fp16"}


@pytest.fixture(scope="module")
def source(stage_cache: Path) -> Path:
    """A random checkpoint; what shapes do not show is as published."""
    return kept_checkpoint(StageCache(stage_cache), "large", Layout(published=True))


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    return write_single(source, tmp_path / "some.safetensors", ["transformer"])


def flattened(tensors: Tensors) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def open_clip(tensors: Tensors) -> Tensors:
    """As OpenAI's and open_clip's own models have them."""
    result, rest = {}, dict(tensors)
    embeddings = "text_model.embeddings"
    result["token_embedding.weight"] = rest.pop(f"{embeddings}.token_embedding.weight")
    result["positional_embedding"] = rest.pop(f"{embeddings}.position_embedding.weight")
    for kind in ("weight", "bias"):
        result[f"ln_final.{kind}"] = rest.pop(f"text_model.final_layer_norm.{kind}")
    if "text_projection.weight" in rest:
        result["text_projection"] = rest.pop("text_projection.weight").T
    layers = {int(m[1]) for name in rest if (m := re.search(r"layers\.(\d+)", name))}
    for layer in layers:
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            three = [rest.pop(f"{ours}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            result[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(three)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                result[f"{theirs}.{b}.{kind}"] = rest.pop(f"{ours}.{a}.{kind}")
    assert not rest, sorted(rest)
    return {**result, "logit_scale": torch.ones(()), "attn_mask": torch.zeros(77, 77)}


SPELLINGS = {"as transformers": dict, "flattened": flattened, "open_clip": open_clip}


def check_tensors(checkpoint: AnyCheckpoint, source: Path, part: str) -> None:
    weights = checkpoint.weights(part)
    for name, tensor in part_tensors(source, part).items():
        assert torch.equal(weights.read(name), tensor), name
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.fp8(name) is None


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.transformer.", "cond_stage_model.",
                                    "transformer.", "model.", "own"])  # fmt: skip
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("part", CLIPS)
def test_a_clip_of_its_own(part: str, spelling: str, prefix: str, source: Path, file: Path) -> None:
    if prefix == "own":
        prefix = FILES[part] + "."
    tensors = SPELLINGS[spelling](original(source, part))
    place = file.parent / "text_encoders" / f"{FILES[part]}.safetensors"
    save({prefix + name: tensor for name, tensor in tensors.items()}, place)
    model = look(ModelOptions(str(file)))
    assert model.checkpoint.config(part)["num_hidden_layers"] == 3
    check_tensors(model.checkpoint, source, part)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_clips_in_the_file(spelling: str, source: Path, tmp_path: Path) -> None:
    """As ComfyUI saves them; as SD XL has them."""
    file = write_single(source, tmp_path / "some.safetensors")
    tensors = load_file(file)
    for names in (
        ("text_encoders.clip_l.", "text_encoders.clip_g."),
        ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
        ("cond_stage_model.transformer.", "clip_g."),
    ):
        changed = {k: v for k, v in tensors.items() if not re.match(r"text_encoders.clip", k)}
        for part, prefix in zip(CLIPS, names, strict=True):
            clip = SPELLINGS[spelling](original(source, part))
            changed |= {prefix + name: tensor for name, tensor in clip.items()}
        save(changed, file)
        model = look(ModelOptions(str(file)))
        for part in CLIPS:
            assert model.checkpoint.files(part) == [file]
            check_tensors(model.checkpoint, source, part)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("part", CLIPS)
def test_a_clip_in_a_folder(part: str, spelling: str, source: Path, tmp_path: Path) -> None:
    root = shutil.copytree(source, tmp_path / "model")
    path = root / part / "model.safetensors"
    tensors = SPELLINGS[spelling](load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    check_tensors(look(ModelOptions(str(root))).checkpoint, source, part)
    tensors["visual.proj"] = torch.zeros(2)
    tensors["ln_other.weight"] = torch.zeros(2)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"has no use for 'ln_other\.weight' —"):
        look(ModelOptions(str(root)))


def test_flattened_names_are_what_transformers_reads(source: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    folder = shutil.copytree(source / "text_encoder_2", tmp_path / "clip")
    path = folder / "model.safetensors"
    save_file(flattened(load_file(path)), path, metadata={"format": "pt"})
    model = CLIPTextModelWithProjection.from_pretrained(folder)
    for name, tensor in part_tensors(source, "text_encoder_2").items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", None])
def test_names_of_t5s_embedding(name: str | None, source: Path, tmp_path: Path) -> None:
    root = shutil.copytree(source, tmp_path / "model")
    path = root / "text_encoder_3" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    names = ("shared.weight", "encoder.embed_tokens.weight") if name is None else (name,)
    save_file({**tensors, **{n: embedding.clone() for n in names}}, path)
    check_tensors(look(ModelOptions(str(root))).checkpoint, source, "text_encoder_3")


@pytest.mark.parametrize("prefix", ["", "t5xxl.transformer.", "text_encoders.t5xxl.", "model."])
def test_prefixes_of_t5(prefix: str, source: Path, file: Path) -> None:
    t5 = original(source, "text_encoder_3")
    save(
        {prefix + name: tensor for name, tensor in t5.items()},
        file.parent / "clip" / "t5xxl_fp16.safetensors",
    )
    check_tensors(look(ModelOptions(str(file))).checkpoint, source, "text_encoder_3")


def test_a_file_with_several_encoders(source: Path, file: Path) -> None:
    """An SD XL model, or what ComfyUI saves of a CLIP: each part is taken from it."""
    both = {
        PREFIXES[part] + name: tensor
        for part in FILES
        for name, tensor in original(source, part).items()
    }
    for part in FILES:
        for place in file.parent.glob(f"*/{FILES[part]}.safetensors"):
            place.unlink()
        save(both, file.parent / "clip" / f"{FILES[part]}.safetensors")
    model = look(ModelOptions(str(file)))
    for part in FILES:
        check_tensors(model.checkpoint, source, part)
