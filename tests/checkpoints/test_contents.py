"""What other people's files are taken for, by looking alone: each kind, and what is next to it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35_trt.checkpoints.contents import describe, refusal
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.tensor_names import adapter_kind
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path

Change = Callable[[Path], object]


def refused(path: Path | str, **options: bool) -> str:
    """The one line that a look ends in."""
    with pytest.raises(CheckpointError) as caught:
        look(ModelOptions(str(path), **options))
    message = str(caught.value)
    assert "\n" not in message
    assert " — " in message, "every refusal names what to do"
    return message


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def header_of(described: int, held: int) -> bytes:
    """A safetensors file whose header describes more or less data than there is."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [described], "data_offsets": [0, described]}})
    return len(text).to_bytes(8, "little") + text.encode() + bytes(held)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 16460379262\n".format(
    "0" * 64
)


def torch_zip(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


def legacy_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def plain_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"")


def dangling(path: Path) -> None:
    path.symlink_to("../../blobs/0123")


def unfinished_by_aria2(path: Path) -> None:
    """A file of full length, with a sound header and holes for data."""
    save_file({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(3, 1)}, path)
    write(path.with_name(path.name + ".aria2"), b"\0\1")


# A file under the name model.safetensors → what is said of it.
BROKEN: dict[str, tuple[bytes | str | Change, tuple[str, ...]]] = {
    "LFS pointer": (LFS, ("a Git LFS pointer to 16.5 GB", "git lfs pull")),
    "older LFS pointer": (LFS.replace("git-lfs.github", "hawser.github"), ("a Git LFS pointer",)),
    "git-annex pointer": ("/annex/objects/SHA256E-s1--0.safetensors\n", ("git annex get",)),
    "nothing": (lambda path: None, ("is missing — give a diffusers model",)),
    "empty": (b"", ("is an empty file", "again")),
    "dangling link": (dangling, ("a dangling link to ../../blobs/0123", "mend the link")),
    "link to itself": (lambda path: path.symlink_to(path.name), ("a dangling link",)),
    "web page": ("<!DOCTYPE html>\n<html><body>Sign in", ("a web page", "hf auth login")),
    "web page, bare": ("\n <HTML lang=en>", ("a web page",)),
    "answer of a server": ("Invalid username or password.", ("text ('Invalid username or",)),
    "JSON answer": ('{"error":"Access to model is restricted"}', ("text ('{\"error\"",)),
    "long text": ("Ж" * 5000, ("text ('ЖЖЖ",)),
    "eight bytes": (bytes([9, 0, 0, 0, 0, 0, 0, 0]), ("truncated or damaged: it has 8 bytes",)),
    "header longer than the file": (header_of(8, 8)[:40], ("truncated or damaged: its header",)),
    "header that is no JSON": (
        (9).to_bytes(8, "little") + b"{damaged}" + b"\xff", ("its header is unreadable",)),
    "header of other JSON": ((8).to_bytes(8, "little") + b'{"a": 1}\xff', ("is unreadable",)),
    "data shorter than the header": (header_of(800, 799), ("header describes", "the file has")),
    "data longer than the header": (header_of(800, 801), ("header describes", "the file has")),
    "zeros": (bytes(4096), ("4.1 kB of zeros: a download that did not finish",)),
    "noise": (bytes(range(255, 0, -1)) * 9, ("no safetensors file, not Stable Diffusion 3.5",)),
    "no tensor": ((2).to_bytes(8, "little") + b"{}", ("a file without a tensor",)),
    "unfinished by aria2": (unfinished_by_aria2, ("did not finish (model.safetensors.aria2",)),
    "unfinished by a browser": (
        lambda path: write(path.with_name("model.safetensors.crdownload"), b"x"),
        ("missing: its download did not finish (model.safetensors.crdownload)",)),
    "unfinished by wget": (
        lambda path: write(path.with_name("model.safetensors.part"), b"x"), (".part",)),
    "unfinished by hf": (
        lambda path: write(
            path.parent / ".cache/huggingface/download/Ab3=.0123.incomplete", b"x"),
        (".cache/huggingface/download/Ab3=.0123.incomplete",)),
    "directory": (lambda path: path.mkdir(), ("is an empty folder",)),
    "pipe": (lambda path: os.mkfifo(path), ("neither a file nor a directory",)),
    "PyTorch zip": (torch_zip, ("a pickle", "save_file(torch.load(FILE, weights_only=True)")),
    "PyTorch pickle": (legacy_pickle, ("a pickle", "weights_only=True")),
    "archive": (plain_zip, ("an archive", "unpack it")),
    "half an archive": (b"PK\x03\x04" + bytes(90), ("a zip file without its end",)),
    "gzip": (b"\x1f\x8b\x08" + bytes(90), ("an archive",)),
    "GGUF": (b"GGUF" + bytes(90), ("GGUF",)),
    "GGML": (b"tjgg" + bytes(90), ("a GGML file",)),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(90), ("a picture",)),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), ("an HDF5 file",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_what_its_name_says(case: str, tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "model.safetensors"
    if callable(content):
        content(path)
    else:
        write(path, content)
    message = refused(path)
    assert message.startswith(str(path))
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_by_any_name(suffix: str, tmp_path: Path) -> None:
    """By their bytes; by the name where those tell nothing."""
    for number, make in enumerate((torch_zip, legacy_pickle, lambda p: write(p, b"\xfe\xff\xfd"))):
        path = tmp_path / f"{number}{suffix}"
        make(path)
        assert "is a pickle, which can run code" in refused(path)
    assert "a Git LFS pointer" in refused(write(tmp_path / f"pointer{suffix}", LFS))


def test_a_link_above(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to("/mnt/not-mounted")
    message = refused(tmp_path / "models" / "sd3.5" / "model.safetensors")
    assert f"missing: {tmp_path / 'models'} is a dangling link to /mnt/not-mounted" in message
    message = refused(tmp_path / "models")
    assert "a dangling link to /mnt/not-mounted" in message


@pytest.mark.parametrize("name", ["sd3.5", "sd3.5_large", "sd/large/"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    message = refused(tmp_path / name)
    assert "is missing — give a diffusers model directory" in message
    (tmp_path / "file").write_text("")
    assert "is missing — give a diffusers model directory" in refused(tmp_path / "file" / name)


def test_a_name_like_a_hub_id_is_a_path_where_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dangling link is not asked of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd3.5").symlink_to("/mnt/gone")
    assert "models/sd3.5 is a dangling link to /mnt/gone" in refused("models/sd3.5")
    assert "cannot be fetched from the hub" in refused("models/other")


# Names of tensors → what they are, whose, and the way. The first of each pair of lists is of SD3.
ADAPTERS: dict[str, tuple[list[str], str, str]] = {
    "kohya": (
        [
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight",
            "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha",
        ],
        "a LoRA in kohya's names",
        "--lora FILE",
    ),
    "kohya, text encoder": (
        ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
        "a LoRA in kohya's",
        "--lora FILE",
    ),
    "kohya, convolution": (["lora_unet_x_embedder_proj.lora_mid.weight"], "a LoRA", "--lora FILE"),
    "OneTrainer": (
        ["lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight"],
        "a LoRA in kohya's names",
        "--lora FILE",
    ),
    "diffusers": (
        [
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        ],
        "a LoRA in diffusers' names",
        "--lora FILE",
    ),
    "diffusers, text encoder": (
        ["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"],
        "a LoRA in diffusers' names",
        "--lora FILE",
    ),
    "diffusers, older": (
        [
            "transformer.transformer_blocks.0.attn.processor.to_q_lora.down.weight",
            "transformer.transformer_blocks.0.attn.processor.to_q_lora.up.weight",
        ],
        "a LoRA in diffusers' names",
        "--lora FILE",
    ),
    "diffusers, dotted": (
        ["transformer.transformer_blocks.0.attn.to_q.lora.down.weight"],
        "a LoRA in diffusers' names",
        "--lora FILE",
    ),
    "PEFT": (
        ["base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"],
        "a LoRA in PEFT's names",
        "--lora FILE",
    ),
    "PEFT, with the adapter's name": (
        ["base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight"],
        "a LoRA in PEFT's names",
        "--lora FILE",
    ),
    "original": (
        ["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"],
        "a LoRA in the original names",
        "--lora FILE",
    ),
    "original, bare": (
        ["joint_blocks.0.x_block.attn.qkv.lora_B.weight"],
        "a LoRA in the original names",
        "--lora FILE",
    ),
    "of FLUX, kohya": (
        ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
        "a LoRA for FLUX",
        "give a Stable Diffusion 3.5 model",
    ),
    "of FLUX, diffusers": (
        [
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        ],
        "a LoRA for FLUX",
        "give a Stable",
    ),
    "of FLUX, XLabs": (["double_blocks.0.processor.qkv_lora1.down.weight"], "a LoRA for FLUX", ""),
    "of SDXL": (
        ["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"],
        "a LoRA for Stable Diffusion 1, 2 or XL",
        "give a Stable",
    ),
    "LoKr": (
        [
            "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
            "lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a",
        ],
        "a LoKr",
        "--lora FILE",
    ),
    "LoKr, kohya": (
        ["lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1_a"],
        "a LoKr",
        "--lora FILE",
    ),
    "LoHa": (["lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a"], "a LoHa", "--lora FILE"),
    "LoHa, PEFT": (["base_model.model.transformer_blocks.0.attn.to_q.hada_w2_b"], "a LoHa", ""),
    "OFT": (["lora_unet_joint_blocks_0_x_block_attn_qkv.oft_blocks"], "an OFT adapter", "ComfyUI"),
    "OFT, PEFT": (
        ["base_model.model.transformer_blocks.0.attn.to_q.oft_R.weight"],
        "an OFT adapter",
        "merge_and_unload()",
    ),
    "BOFT": (["base_model.model.transformer_blocks.0.attn.to_q.boft_R"], "a BOFT", "merge_and"),
    "DoRA, kohya": (
        [
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
            "lora_unet_joint_blocks_0_x_block_attn_qkv.dora_scale",
        ],
        "a DoRA",
        "--lora FILE",
    ),
    "DoRA, PEFT": (
        [
            "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
            "base_model.model.transformer_blocks.0.attn.to_q.lora_magnitude_vector",
        ],
        "a DoRA",
        "--lora FILE",
    ),
    "(IA)³": (
        ["base_model.model.transformer_blocks.0.attn.to_q.ia3_l"],
        "an (IA)³ adapter",
        "PEFT",
    ),
    "(IA)³, LyCORIS": (["lora_unet_joint_blocks_0_x_block_attn_qkv.on_input"], "an (IA)³", ""),
    "GLoRA": (
        ["lora_unet_joint_blocks_0_x_block_attn_qkv.a1.weight"],
        "a LyCORIS adapter",
        "Comfy",
    ),
    "full difference": (["lora_unet_joint_blocks_0_x_block_attn_qkv.diff"], "a LyCORIS", "ComfyUI"),
    "VeRA": (["base_model.model.transformer_blocks.0.attn.to_q.vera_lambda_b"], "a PEFT", "merge"),
    "ControlNet, diffusers": (
        ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"],
        "a ControlNet",
        "--controlnet NAME=DIR",
    ),
    "ControlNet, Stability's": (
        ["controlnet_blocks.0.weight", "pos_embed_input.proj.weight"],
        "a ControlNet",
        "--controlnet NAME=DIR",
    ),
    "ControlNet in the model's names": (
        ["joint_blocks.0.x_block.attn.qkv.weight", "controlnet_blocks.0.weight"],
        "a ControlNet",
        "",
    ),
    "ControlNet of SD1": (["control_model.input_hint_block.0.weight"], "a ControlNet", "alone"),
    "IP-Adapter": (
        ["image_proj.proj_in.weight", "ip_adapter.0.to_k_ip.weight"],
        "an IP-Adapter",
        "alone",
    ),
    "T2I-Adapter": (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter", "alone"),
    "motion module": (
        ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
        "a motion module",
        "alone",
    ),
}


def file_with(path: Path, names: list[str], shape: tuple[int, ...] = (4, 4)) -> Path:
    save_file({name: torch.zeros(shape) for name in names}, path)
    return path


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_given_as_a_model(case: str, tmp_path: Path) -> None:
    """As a file, and as the one file of a folder."""
    names, title, advice = ADAPTERS[case]
    path = file_with(tmp_path / "adapter.safetensors", names)
    if case != "ControlNet in the model's names":  # which has the model's anchor
        message = refused(path)
        assert f"is {title}" in message
        assert advice in message
    else:
        assert "a ControlNet" in refusal(path).args[0]
    message = refused(tmp_path)
    assert f"which is {title}" in message
    assert advice in message


MODELS = {
    "FLUX": (["double_blocks.0.img_attn.qkv.weight"], "FLUX"),
    "FLUX in ComfyUI's names": (
        ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
        "FLUX",
    ),
    "FLUX's transformer": (
        ["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"],
        "FLUX",
    ),
    "FLUX.2": (
        ["single_stream_modulation.lin.weight", "double_blocks.0.img_attn.qkv.weight"],
        "FLUX.2",
    ),
    "Chroma": (
        ["distilled_guidance_layer.in_proj.bias", "double_blocks.0.img_attn.qkv.weight"],
        "Chroma",
    ),
    "HunyuanVideo": (
        [
            "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
            "double_blocks.0.img_attn_qkv.weight",
        ],
        "HunyuanVideo",
    ),
    "SD1": (
        [
            "cond_stage_model.transformer.text_model.x",
            "model.diffusion_model.input_blocks.0.0.weight",
        ],
        "Stable Diffusion 1,",
    ),
    "SD2": (
        ["cond_stage_model.model.ln_final.bias", "model.diffusion_model.input_blocks.0.0.weight"],
        "Stable Diffusion 2,",
    ),
    "SDXL": (
        ["conditioner.embedders.0.x", "model.diffusion_model.input_blocks.0.0.weight"],
        "Stable Diffusion XL,",
    ),
    "a UNet": (["model.diffusion_model.input_blocks.0.0.weight"], "the UNet of Stable Diffusion 1"),
    "diffusers' UNet": (
        ["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"],
        "the UNet of Stable Diffusion 1",
    ),
    "PixArt": (["blocks.0.cross_attn.q_linear.weight"], "PixArt"),
    "Sana": (
        ["blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.cross_attn.q_linear.weight"],
        "Sana",
    ),
    "AuraFlow": (["double_layers.0.attn.w2q.weight"], "AuraFlow"),
    "Wan": (["head.modulation", "blocks.0.self_attn.q.weight"], "Wan"),
    "LTX-Video": (["model.diffusion_model.patchify_proj.weight"], "LTX-Video"),
    "SD3's transformer": (
        [
            "transformer_blocks.0.norm1_context.linear.weight",
            "transformer_blocks.0.attn.to_q.weight",
        ],
        "SD3's transformer",
    ),
    "a transformer": (["transformer_blocks.0.attn.to_q.weight"], "a transformer"),
    "autoencoder": (["decoder.up_blocks.0.resnets.0.conv1.weight"], "an autoencoder"),
    "autoencoder, original": (["decoder.up.0.block.0.conv1.weight"], "an autoencoder"),
    "TAESD": (["decoder.layers.0.conv.0.weight"], "TAESD"),
    "CLIP": (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder"),
    "open_clip": (["token_embedding.weight", "transformer.resblocks.0.ln_1.bias"], "a CLIP text"),
    "CLIP's image encoder": (
        ["vision_model.embeddings.patch_embedding.weight"],
        "an image encoder",
    ),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
    "language model": (["model.layers.0.self_attn.q_proj.weight"], "a language model"),
    "upscaler": (["body.0.rdb1.conv1.weight"], "an upscaler"),
    "something": (["weights.of.something"], "something else (its first tensor is 'weights.of.s"),
}


@pytest.mark.parametrize("case", MODELS)
def test_another_models_file(case: str, tmp_path: Path) -> None:
    names, title = MODELS[case]
    message = refused(file_with(tmp_path / "model.safetensors", names))
    assert title in message
    assert "not Stable Diffusion 3.5 — give " in message


@pytest.mark.parametrize(
    ("names", "width", "embedding"),
    [
        (["clip_l", "clip_g"], 768, True), (["emb_params"], 1024, True), (["<cat-toy>"], 768, True),
        (["cat"], 4096, True), (["t5xxl", "clip_l", "clip_g"], 4096, True),
        (["cat"], 77, False), (["a.cat"], 768, False), (list("abcde"), 768, False),
    ],
)  # fmt: skip
def test_a_textual_inversion(names: list[str], width: int, embedding: bool, tmp_path: Path) -> None:
    message = refused(file_with(tmp_path / "word.safetensors", names, (2, width)))
    assert ("a textual inversion" in message) == embedding


def test_no_tensor_of_a_model_is_taken_for_an_adapters() -> None:
    for path in checkpoint_path().rglob("*.safetensors"):
        assert adapter_kind(load_file(path)) is None


# A folder → what is said of it.


def index(kind: object) -> Change:
    return lambda root: write(root / "model_index.json", json.dumps({"_class_name": kind}))


def config(name: str, **values: object) -> Change:
    return lambda root: write(root / name, json.dumps(values))


def single_files(root: Path) -> None:
    file_with(root / "clip_l.safetensors", ["text_model.embeddings.token_embedding.weight"])
    file_with(root / "sd3.5_large.safetensors", ["joint_blocks.0.x_block.attn.qkv.weight"])


def hub_cache(root: Path) -> None:
    shutil.copytree(checkpoint_path() / "scheduler", root / "snapshots" / "0123" / "scheduler")
    write(root / "snapshots" / "0123" / "model_index.json", "{}")


FOLDERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "empty": (lambda root: None, ("an empty folder",)),
    "of something else": (config("README.md"), ("no model_index.json", "holds no weights")),
    "FLUX": (index("FluxPipeline"), ("a FluxPipeline in diffusers' layout", "not Stable")),
    "SDXL": (index("StableDiffusionXLPipeline"), ("a StableDiffusionXLPipeline",)),
    "SD1": (index("StableDiffusionPipeline"), ("a StableDiffusionPipeline in",)),
    "a pipeline of someone's": (index(["pipeline", "Mine"]), ("Mine",)),
    "no pipeline": (index(None), ("without a pipeline's class",)),
    "model_index.json that is a pointer": (
        lambda root: write(root / "model_index.json", LFS), ("a Git LFS pointer", "git lfs pull")),
    "model_index.json that is a page": (
        lambda root: write(root / "model_index.json", "<html>"), ("a web page",)),
    "model_index.json that is empty": (
        lambda root: write(root / "model_index.json", ""), ("an empty file",)),
    "model_index.json that is a list": (
        lambda root: write(root / "model_index.json", "[]"), ("no JSON object",)),
    "bundle": (config("bundle.json"), ("a bundle that sd35-trt built", "sd35-trt generate")),
    "PEFT, LoRA": (config("adapter_config.json", peft_type="LORA"), ("a LoRA of PEFT", "--lora")),
    "PEFT, LoKr": (config("adapter_config.json", peft_type="LOKR"), ("a LoKr of PEFT",)),
    "PEFT, other": (
        config("adapter_config.json", peft_type="VERA"), ("an adapter of PEFT", "merge")
    ),
    "ControlNet": (
        config("config.json", _class_name="SD3ControlNetModel"),
        ("a ControlNet (SD3Con", "--controlnet NAME=DIR"),
    ),
    "transformer alone": (
        config("config.json", _class_name="SD3Transformer2DModel"),
        ("one part of a model (SD3Transformer2DModel)", "its directory")),
    "text encoder alone": (
        config("config.json", architectures=["T5EncoderModel"]), ("a model (T5EncoderModel)",)),
    "single files": (
        single_files,
        ("a folder of single files (sd3.5_large.safetensors and 1 more)", "give ", "/sd3.5_large")),
    "files that are no model": (
        lambda root: [file_with(root / f"{n}.safetensors", ["lora_unet_x.lora_up.weight"])
                      for n in "ab"], ("of which none is a model (a.safetensors, b.s",)),
    "LFS pointers": (
        lambda root: write(root / "model.safetensors", LFS), ("a Git LFS pointer", "git lfs pull")),
    "GGUF": (lambda root: write(root / "m.gguf", b"GGUF" + bytes(9)), ("m.gguf, which is a GGUF",)),
    "pickle": (lambda root: torch_zip(root / "m.ckpt"), ("m.ckpt, which is a pickle", "convert")),
    "ONNX": (lambda root: write(root / "m.onnx", b"\x08\x09"), ("an ONNX graph",)),
    "half a download": (
        lambda root: write(root / "sd3.5.safetensors.part", b"x"), ("did not finish",)),
    "half a download by hf": (
        lambda root: write(root / ".cache/huggingface/download/vae/a.b.incomplete", b""),
        ("did not finish", "hf download")),
    "no model_index.json": (
        lambda root: [(root / part).mkdir() for part in ("transformer", "vae")],
        ("a folder with transformer, vae, but no model_index.json",)),
    "above a model": (
        lambda root: write(root / "sd3.5" / "model_index.json", "{}"),
        ("a folder above a model", "give ", "/sd3.5")),
    "above two": (
        lambda root: [write(root / n / "model_index.json", "{}") for n in "ab"],
        ("a folder above 2 models",)),
    "hub cache": (hub_cache, ("a folder above a model", "snapshots/0123")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model(case: str, tmp_path: Path) -> None:
    make, words = FOLDERS[case]
    root = tmp_path / "folder"
    root.mkdir()
    make(root)
    message = refused(root)
    for word in words:
        assert word in message, message


def test_a_part_of_a_model_names_the_model(tmp_path: Path) -> None:
    root = checkpoint_path()
    assert f"give the model's directory: {root}" in refused(root / "transformer")
    assert f"give the model's directory: {root}" in refused(root / "model_index.json")
    assert f"give the model's directory: {root}" in refused(root / "vae" / "config.json")
    for folder in ("scheduler", "tokenizer_3"):
        assert f"give the model's directory: {root}" in refused(root / folder)
    assert "an autoencoder" in refused(root / "vae" / "diffusion_pytorch_model.safetensors")


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_with(tmp_path / "model.safetensors", ["a"])

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert describe(path).title == "not readable (Permission denied)"
