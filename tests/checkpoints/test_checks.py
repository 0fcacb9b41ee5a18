"""A look tells all that is wrong with a model's parts, one line a part, before any work."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import PREFIXES, original, save, write_single
from random_checkpoints import Layout, kept_checkpoint
from safetensors.torch import load_file, save_file

from sd35_trt.checkpoints.comfy import INPUT_SCALES
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.structure import published_config
from sd35_trt.checkpoints.tensor_files import open_safetensors
from sd35_trt.checkpoints.tensor_shapes import tensor_shapes
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path
from sd35_trt.store.cache import StageCache

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """mini's checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "mini"))


@pytest.fixture(scope="module")
def source(stage_cache: Path) -> Path:
    """A random checkpoint; what shapes do not show is as published."""
    return kept_checkpoint(StageCache(stage_cache), "large", Layout(published=True))


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    """Its transformer in the original layout, the other parts beside it."""
    return write_single(source, tmp_path / "models" / "some.safetensors", ["transformer"])


def configure(model: Path, part: str, **changes: Any) -> None:
    path = model / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(model: Path, part: str, edit: Callable[[Tensors], object]) -> None:
    (path,) = (model / part).glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refusal(model: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        look(ModelOptions(str(model)))
    lines = str(caught.value).splitlines()
    assert all(" — " in line for line in lines), "every line names what to do"
    return lines


def one_line(model: Path, *words: str) -> None:
    (line,) = refusal(model)
    for word in words:
        assert word in line, line


# Configurations.


@pytest.mark.parametrize("value", [None, False, [], ""])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_an_unknown_key_that_says_nothing(part: str, value: object, model: Path) -> None:
    """diffusers loads such fine-tunes."""
    before = look(ModelOptions(str(model))).checkpoint.config(part)
    configure(model, part, enable_time_sign_embed=value)
    assert look(ModelOptions(str(model))).checkpoint.config(part) == before


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_an_unknown_key(part: str, model: Path) -> None:
    configure(model, part, enable_time_sign_embed=True, pos_embed_type="rope")
    one_line(
        model, f"{part}/config.json", "enable_time_sign_embed = true", 'pos_embed_type = "rope"'
    )


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_settings_that_no_encoder_reads(part: str, model: Path) -> None:
    """The published T5's configuration has them."""
    configure(model, part, output_past=True, n_positions=512, task_specific_params={"a": 1})
    look(ModelOptions(str(model)))


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"num_layers": "6"}, 'num_layers = "6", not a whole number'),
        ("transformer", {"num_layers": 0}, "num_layers = 0"),
        ("transformer", {"num_layers": 10**12}, "not a whole number from 1 to 1000"),
        ("transformer", {"num_attention_heads": None}, "num_attention_heads = null"),
        ("transformer", {"qk_norm": "layer_norm"}, 'qk_norm = "layer_norm"'),
        ("transformer", {"dual_attention_layers": ["0"]}, 'dual_attention_layers = ["0"]'),
        ("transformer", {"caption_projection_dim": 128}, "caption_projection_dim = 128"),
        ("transformer", {"in_channels": 33}, "33 input channels"),
        ("text_encoder", {"hidden_act": "sigmoid"}, 'hidden_act = "sigmoid"'),
        ("text_encoder", {"num_attention_heads": 3}, "num_attention_heads = 3"),
        ("text_encoder_3", {"feed_forward_proj": "gated"}, 'feed_forward_proj = "gated"'),
        ("vae", {"act_fn": "mish"}, 'act_fn = "mish"'),
        ("vae", {"block_out_channels": [32, 48, 64]}, "reduces 4 times"),
        ("vae", {"block_out_channels": 32}, "block_out_channels = 32"),
        ("vae", {"norm_num_groups": 7}, "norm_num_groups = 7"),
        ("vae", {"down_block_types": None}, "down_block_types = null"),
        ("vae", {"in_channels": 4}, "in_channels = 4"),
        ("vae", {"scaling_factor": None}, "scaling_factor = null; SD3.5's is 1.5305"),
        ("vae", {"scaling_factor": 0.0}, "scaling_factor = 0.0"),
        ("vae", {"scaling_factor": math.inf}, "scaling_factor = Infinity"),
        ("vae", {"shift_factor": None}, "shift_factor = null; SD3.5's is 0.0609"),
        ("vae", {"shift_factor": math.nan}, "shift_factor = NaN"),
    ],
)
def test_a_value_that_is_not_computed(
    part: str, changes: dict[str, Any], words: str, model: Path
) -> None:
    configure(model, part, **changes)
    one_line(model, f"{part}/config.json", words)


def test_keys_left_to_the_class(model: Path) -> None:
    """Defaults are diffusers': mini has them here, but not in its table of positions."""
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for key in ("patch_size", "in_channels", "out_channels", "dual_attention_layers"):
        del config[key]
    path.write_text(json.dumps(config))
    assert look(ModelOptions(str(model))).checkpoint.config("transformer")["patch_size"] == 2
    del config["pos_embed_max_size"]
    path.write_text(json.dumps(config))
    one_line(model, "'pos_embed.pos_embed' has shape [1, 576, 192]", "[1, 9216, 192]")


# Classes.


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("transformer", "FluxTransformer2DModel", "FLUX's transformer"),
        ("transformer", "SD3ControlNetModel", "a ControlNet"),
        ("transformer", "SomeTransformer", "not SD3Transformer2DModel"),
        ("text_encoder_3", "UMT5EncoderModel", "UMT5, not T5"),
        ("text_encoder", "BertModel", "not CLIPTextModelWithProjection"),
        ("vae", "AutoencoderTiny", "TAESD"),
        ("vae", "AutoencoderKLQwenImage", "Qwen-Image's autoencoder"),
    ],
)
def test_another_class(part: str, name: str, words: str, model: Path) -> None:
    key = "_class_name" if part in ("transformer", "vae") else "architectures"
    configure(model, part, **{key: name if key == "_class_name" else [name]})
    one_line(model, f"{part}/config.json has the class {name}", words)
    # Where the configuration names none, the index does.
    configure(model, part, **{key: None})
    look(ModelOptions(str(model)))
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: ["library", name]}))
    one_line(model, f"has the class {name}")


def test_a_clip_without_projection(model: Path) -> None:
    configure(model, "text_encoder_2", architectures=["CLIPTextModel"])
    look(ModelOptions(str(model)))  # with its projection, it is the same model
    change(model, "text_encoder_2", lambda tensors: tensors.pop("text_projection.weight"))
    one_line(model, "text_encoder_2", "text_projection.weight", "CLIPTextModelWithProjection")


def test_a_whole_t5(model: Path) -> None:
    """Its encoder is the same; what the decoder has is left alone."""
    configure(model, "text_encoder_3", architectures=["T5ForConditionalGeneration"])

    def add(tensors: Tensors) -> None:
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(4, 4)
        for name in ("lm_head.weight", "encoder.embed_tokens.weight"):
            tensors[name] = torch.zeros(212, 256)

    change(model, "text_encoder_3", add)
    look(ModelOptions(str(model)))


def test_a_whole_clip(model: Path) -> None:
    """Its text model is the same; what the vision model has is left alone."""
    path = model / "text_encoder" / "config.json"
    text = json.loads(path.read_text())
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512}
    path.write_text(json.dumps({**whole, "text_config": text, "vision_config": {}}))
    change(
        model,
        "text_encoder",
        lambda tensors: tensors.update(
            {
                "vision_model.embeddings.class_embedding": torch.zeros(3),
                "logit_scale": torch.ones(()),
            }
        ),
    )
    assert look(ModelOptions(str(model))).checkpoint.config("text_encoder")["hidden_size"] == 64


# Tensors.


def test_norms_that_the_configuration_does_not_have(model: Path) -> None:
    """Dropped without a word, they made a wrong picture."""
    configure(model, "transformer", qk_norm=None)
    one_line(model, "has no use for 'transformer_blocks.0.attn.norm_added_k.weight' and 23 more")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "transformer_blocks.6.attn.to_q.weight"),
        ("transformer", "time_sign_embed.weight"),
        ("text_encoder", "text_model.encoder.layers.2.mlp.fc1.weight"),
        ("text_encoder_3", "encoder.block.4.layer.0.layer_norm.weight"),
        ("vae", "quant_conv.weight"),
    ],
)
def test_an_unused_tensor(part: str, name: str, model: Path) -> None:
    change(model, part, lambda tensors: tensors.update({name: torch.zeros(2)}))
    one_line(model, str(model / part), f"has no use for '{name}'")


def test_buffers_are_no_weights(model: Path) -> None:
    ids = {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    change(model, "text_encoder", lambda tensors: tensors.update(ids))
    look(ModelOptions(str(model)))


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_a_tensor_without_numbers(kind: torch.dtype, model: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].to(kind)

    change(model, "vae", edit)
    one_line(model, str(model / "vae"), "encoder.conv_in")


def test_double_precision(model: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    change(model, "vae", edit)
    look(ModelOptions(str(model)))


@pytest.mark.parametrize("word", [*INPUT_SCALES, "weight_scale"])
def test_scales_beside_a_cast(word: str, model: Path) -> None:
    """Of inputs alone, with any spelling; a scale of a layer that is not there is told."""
    layer = "transformer_blocks.0.attn.to_q"

    def edit(tensors: Tensors) -> None:
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
        if word in INPUT_SCALES:
            tensors[f"{layer}.{word}"] = torch.tensor(0.5)
        else:
            tensors[f"{layer}_2.{word}"] = torch.tensor(0.5)

    change(model, "transformer", edit)
    if word in INPUT_SCALES:
        look(ModelOptions(str(model)))
    else:
        one_line(model, f"has no use for '{layer}_2.{word}'")


# Widths.


def test_widths(model: Path) -> None:
    """Parts that are sound by themselves, of other models."""

    def wide(tensors: Tensors) -> None:
        tensors["text_projection.weight"] = torch.zeros(80, 96)

    change(model, "text_encoder_2", wide)
    configure(model, "text_encoder_2", projection_dim=80)

    def narrow(tensors: Tensors) -> None:
        for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
            tensors[name] = tensors[name][:8].contiguous()
        tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :4].contiguous()

    change(model, "vae", narrow)
    configure(model, "vae", latent_channels=4)

    def wider(tensors: Tensors) -> None:
        name = "context_embedder.weight"
        tensors[name] = torch.cat([tensors[name]] * 2, 1)

    change(model, "transformer", wider)
    configure(model, "transformer", joint_attention_dim=512)
    clip, t5, vae = refusal(model)
    assert "CLIP-L and CLIP-G together (64 + 80) put out 144 channels" in clip
    assert "the transformer takes 160" in clip
    assert "T5 put out 256 channels, the transformer takes 512" in t5
    assert "the autoencoder put out 4 channels, the transformer takes 16" in vae


# Tokenizers.


def retokenize(model: Path, folder: str, **changes: Any) -> None:
    path = model / folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_more_ids_than_rows(folder: str, model: Path) -> None:
    rows = 212 if folder == "tokenizer_3" else 752
    # mini's vocabularies fill their embeddings.
    retokenize(model, folder, additional_special_tokens=["<style>"])
    one_line(model, str(model / folder), f"'<style>' the id {rows}", f"has {rows} rows")
    retokenize(model, folder, additional_special_tokens=[], pad_token={"content": "<none>"})
    one_line(model, "'<none>'")
    retokenize(model, folder, pad_token="</s>" if folder == "tokenizer_3" else "!")
    look(ModelOptions(str(model)))
    path = model / folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({"id": rows + 7, "content": "<late>", "special": False})
    path.write_text(json.dumps(data))
    one_line(model, f"'<late>' the id {rows + 7}")


def test_ids_of_a_vocabulary_in_a_file_of_its_own(model: Path) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink()
    look(ModelOptions(str(model)))
    (model / "tokenizer" / "added_tokens.json").write_text('{"<style>": 760}')
    one_line(model, "'<style>' the id 760")
    (model / "tokenizer" / "vocab.json").unlink()
    one_line(model, "no tokenizer.json, vocab.json or spiece.model")


def test_an_end_token_that_the_clip_does_not_look_for(model: Path) -> None:
    configure(model, "text_encoder", eos_token_id=751)
    look(ModelOptions(str(model)))
    configure(model, "text_encoder", eos_token_id=750)
    one_line(model, "ends texts with the id 751; CLIP-L looks for 750")


def lengthen(model: Path, folder: str) -> None:
    name = "text_model.embeddings.position_embedding.weight"
    change(model, folder, lambda t: t.update({name: torch.zeros(100, t[name].shape[1])}))
    configure(model, folder, max_position_embeddings=100)


def test_positions_beyond_the_tokenizers_length(model: Path) -> None:
    """Of Long-CLIP: used as far as the tokenizer goes, and said."""
    lengthen(model, "text_encoder")
    assert look(ModelOptions(str(model))).notes == (
        "CLIP-L has 100 positions; its tokenizer uses 32 of them",
    )
    retokenize(model, "tokenizer", model_max_length=100)
    one_line(model, "texts of different lengths (CLIP-L 100, CLIP-G 32)")
    lengthen(model, "text_encoder_2")
    retokenize(model, "tokenizer_2", model_max_length=None)
    assert look(ModelOptions(str(model))).notes == ()


# Together.


def test_one_line_a_part(model: Path) -> None:
    configure(model, "transformer", enable_time_sign_embed=True)
    configure(model, "text_encoder_3", architectures=["UMT5EncoderModel"])
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    retokenize(model, "tokenizer", additional_special_tokens=["<style>"])
    (model / "scheduler" / "scheduler_config.json").unlink()
    parts = [line.split("mini/")[1].split("/")[0].split()[0] for line in refusal(model)]
    assert parts == ["text_encoder_3", "transformer", "vae", "tokenizer", "scheduler"]


def test_the_command_prints_a_line_each(run, model: Path) -> None:  # type: ignore[no-untyped-def]
    configure(model, "transformer", enable_time_sign_embed=True)
    configure(model, "vae", _class_name="AutoencoderTiny")
    status, out, err = run("build", "--gpu", "cpu", "--model", str(model))
    assert (status, out) == (1, "")
    assert [line.split(": ")[0] for line in err.splitlines()] == ["error", "error"]


# Single files.


def test_a_single_file(file: Path) -> None:
    model = look(ModelOptions(str(file)))
    assert model.notes == ()
    tensors = load_file(file)
    save({**tensors, "joint_blocks.0.x_block.attn.extra.weight": torch.zeros(2)}, file)
    one_line(file, str(file), "has no use for 'joint_blocks.0.x_block.attn.extra.weight'")
    save({**tensors, "text_encoders.clip_x.weight": torch.zeros(2)}, file)
    one_line(file, "has no use for 'text_encoders.clip_x.weight'")
    save({**tensors, "model_ema.decay": torch.zeros(2), "denoiser.sigmas": torch.zeros(3)}, file)
    look(ModelOptions(str(file)))


def test_parts_of_a_single_file_are_told_together(file: Path, source: Path) -> None:
    tensors = load_file(file)
    del tensors["joint_blocks.2.x_block.attn.qkv.bias"]
    save(tensors, file)
    clip = original(source, "text_encoder_2")
    clip["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    clip["text_model.encoder.layers.1.mlp.fc3.weight"] = torch.zeros(3)
    save(clip, file.parent / "text_encoders" / "clip_g.safetensors")
    t5 = {k: v for k, v in original(source, "text_encoder_3").items() if "wi_0" not in k}
    save(t5, file.parent / "clip" / "t5xxl_fp16.safetensors")
    lines = refusal(file)
    assert len(lines) == 3, lines
    assert "fc3" in lines[0]
    assert "t5xxl_fp16.safetensors has no tensor" in lines[1]
    assert "joint_blocks.2.x_block.attn.qkv.bias" in lines[2]


def test_all_in_one_file(source: Path, tmp_path: Path) -> None:
    path = write_single(source, tmp_path / "some.safetensors")
    look(ModelOptions(str(path)))
    tensors = load_file(path)
    idle = {
        "text_encoders.clip_l.transformer.text_projection.weight": torch.zeros(64, 64),
        "text_encoders.clip_g.logit_scale": torch.ones(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    save({**tensors, **idle}, path)
    look(ModelOptions(str(path)))
    name = PREFIXES["vae"] + "quant_conv2.weight"
    save({**tensors, name: torch.zeros(2)}, path)
    one_line(path, str(path), f"has no use for '{name}'")


# Full size.


def write_headers(folder: Path, stem: str, part: str, shards: int) -> None:
    """A part's files with headers and holes for values, which take no room on the disk."""
    shapes = sorted(tensor_shapes(part, published_config(part)).items())
    index = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for tensor, shape in shapes[number::shards]:
            begin, end = end, end + 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            index[tensor] = name
        data = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(data).to_bytes(8, "little") + data)
            file.truncate(8 + len(data) + end)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


class Header:
    """A mapped file that gives away no values."""

    def __init__(self, handle: Any) -> None:
        self.keys, self.get_slice, self.metadata = handle.keys, handle.get_slice, handle.metadata


def test_a_full_size_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """26 GB of weights, of which the headers alone are read."""
    opened = open_safetensors
    monkeypatch.setattr(
        "sd35_trt.checkpoints.tensor_files.open_safetensors", lambda *args: Header(opened(*args))
    )
    for part, shards in (
        ("text_encoder", 1), ("text_encoder_2", 2), ("text_encoder_3", 2), ("transformer", 3),
        ("vae", 1),
    ):  # fmt: skip
        (path,) = (model / part).glob("*.safetensors")
        stem = path.stem
        path.unlink()
        configure(model, part, **published_config(part))
        write_headers(model / part, stem, part, shards)
    weights = list(model.glob("*/*.safetensors"))
    assert sum(path.stat().st_size for path in weights) > 25e9
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        retokenize(model, folder, model_max_length=77)
    large = look(ModelOptions(str(model)))
    assert (large.variant.name, large.notes) == ("large", ())
