"""Names that other tools wrap: stripped where that is exact, else the line that names the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from originals import PARTS, PREFIXES, Tensors, part_tensors, save, write_single
from random_checkpoints import Layout, kept_checkpoint
from safetensors.torch import load_file, save_file

from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.single_file import open_checkpoint
from sd35_trt.checkpoints.weights import folder_weights
from sd35_trt.checkpoints.wrappers import common_prefix, plain_name
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path
from sd35_trt.store.cache import StageCache

Rename = Callable[[str], str]


def layers(name: str) -> str:
    """PEFT's: every weight of an attention in a layer of its own."""
    layer, _, parameter = name.rpartition(".")
    return f"{layer}.base_layer.{parameter}" if ".attn." in layer else name


def blocks(word: str) -> Rename:
    """A word after the number of each block."""

    def rename(name: str) -> str:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return name if place is None else ".".join([*parts[: place + 1], word, *parts[place + 1 :]])

    return rename


WRAPPERS: dict[str, Rename] = {
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled, in parallel": lambda name: f"module._orig_mod.{name}",
    "parallel, compiled": lambda name: f"_orig_mod.module.{name}",
    "compiled blocks": blocks("_orig_mod"),
    "FSDP": blocks("_fsdp_wrapped_module"),
    "activation checkpointing": blocks("_checkpoint_wrapped_module"),
    "PEFT's layers": layers,
    "PEFT's model": lambda name: f"base_model.model.{layers(name)}",
}
PREFIXED: dict[str, Rename] = {
    prefix: (lambda name, prefix=prefix: prefix + name)  # type: ignore[misc]
    for prefix in ("model.", "diffusion_model.", "model.diffusion_model.", "module.model.",
                   "transformer.")
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))


@pytest.fixture(scope="session")
def source(stage_cache: Path) -> Path:
    return kept_checkpoint(StageCache(stage_cache), "medium", Layout(published=True))


def weight_file(model: Path, part: str) -> Path:
    (path,) = (model / part).glob("*.safetensors")
    return path


def change(path: Path, rename: Rename, **more: torch.Tensor) -> Tensors:
    """Rename a file's tensors; they are given back as they were named."""
    tensors = load_file(path)
    save_file({rename(name): tensor for name, tensor in tensors.items()} | more, path)
    return tensors


@pytest.mark.parametrize("case", [*WRAPPERS, *PREFIXED])
@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_folders(part: str, case: str, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_path() / part, tmp_path / part)
    tensors = change(weight_file(tmp_path, part), (WRAPPERS | PREFIXED)[case])
    weights = folder_weights(part, tmp_path / part)
    for name, tensor in tensors.items():
        assert name in weights
        assert weights.shape(name) == tuple(tensor.shape)
    name = min(tensors)
    assert torch.equal(weights.read(name), tensors[name])


@pytest.mark.parametrize("parts", [PARTS, ("transformer",)], ids=len)
@pytest.mark.parametrize("case", WRAPPERS)
def test_single_files(case: str, parts: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    file = write_single(source, tmp_path / "sd3.5.safetensors", parts)
    change(file, WRAPPERS[case])
    checkpoint = open_checkpoint(file)
    for name, tensor in part_tensors(source, "transformer").items():
        assert torch.equal(checkpoint.weights("transformer").read(name), tensor), name


@pytest.mark.parametrize("prefix", ["model.", "diffusion_model.", "model.diffusion_model."])
def test_prefixes_of_single_files(prefix: str, source: Path, tmp_path: Path) -> None:
    file = write_single(source, tmp_path / "sd3.5.safetensors", ("transformer",))
    change(file, lambda name: prefix + name)
    weights = open_checkpoint(file).weights("transformer")
    for name, tensor in part_tensors(source, "transformer").items():
        assert torch.equal(weights.read(name), tensor), name


def test_scales_keep_their_layers(source: Path, tmp_path: Path) -> None:
    """ComfyUI's FP8 in a wrapper: the layer's scale, and its format in the metadata."""
    for spelling in ("scaled_fp8", "comfy_quant"):
        plain = write_single(source, tmp_path / "plain.safetensors", spelling=spelling)
        wrapped = Path(shutil.copy(plain, tmp_path / "wrapped.safetensors"))
        change(wrapped, lambda name: f"_orig_mod.{name}")
        ours, theirs = (open_checkpoint(p).weights("transformer") for p in (wrapped, plain))
        name = "transformer_blocks.0.attn.to_q.weight"
        assert torch.equal(ours.read(name), theirs.read(name))
        first, second = ours.fp8(name), theirs.fp8(name)
        assert first is not None
        assert second is not None
        assert torch.equal(first[1], second[1])


# Where stripping is not exact.

BESIDE = {
    "LoRA": "transformer_blocks.0.attn.to_q.lora_A.default.weight",
    "DoRA": "transformer_blocks.0.attn.to_q.lora_magnitude_vector.default.weight",
    "LoKr": "transformer_blocks.0.attn.to_q.lokr_w1",
    "trained copy": "proj_out.modules_to_save.default.weight",
    "IP-Adapter": "transformer_blocks.0.attn.processor.to_k_ip.weight",
}


@pytest.mark.parametrize("case", BESIDE)
def test_an_adapter_beside_the_weights(
    case: str, model: Path, source: Path, tmp_path: Path
) -> None:
    name = BESIDE[case]
    change(weight_file(model, "transformer"), layers, **{name: torch.zeros(4, 4)})
    file = write_single(source, tmp_path / "sd3.5.safetensors")
    change(file, layers, **{PREFIXES["transformer"] + name: torch.zeros(4, 4)})
    for path in (model, file):
        with pytest.raises(CheckpointError) as caught:
            look(ModelOptions(str(path)))
        message = str(caught.value)
        assert "beside its weights" in message
        assert name in message
        assert "unload_lora_weights()" in message
        assert "merge_and_unload()" in message


def test_a_lora_in_place_of_a_part(model: Path, source: Path, tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    save_file({name: torch.zeros(4, 4)}, weight_file(model, "transformer"))
    with pytest.raises(CheckpointError, match="holds a LoRA in diffusers' names, not transformer"):
        look(ModelOptions(str(model)))
    file = write_single(source, tmp_path / "sd3.5.safetensors", ("transformer",))
    beside = file.parent / "text_encoders" / "clip_l.safetensors"
    save({"lora_te1_text_model.lora_up.weight": torch.zeros(4, 4)}, beside)
    with pytest.raises(CheckpointError, match="a LoRA in kohya's names, not the model's CLIP-L"):
        look(ModelOptions(str(file)))


def test_two_tensors_of_one_name(model: Path) -> None:
    tensors = load_file(weight_file(model, "vae"))
    name = "decoder.conv_in.bias"
    change(weight_file(model, "vae"), str, **{f"module.{name}": tensors[name] + 1})
    with pytest.raises(CheckpointError, match=f"'{name}' and 'module.{name}', which are one"):
        look(ModelOptions(str(model)))


def test_no_name_of_the_model_is_changed() -> None:
    for path in checkpoint_path().rglob("*.safetensors"):
        names = list(load_file(path))
        assert [plain_name(name) for name in names] == names
        assert common_prefix(names) == ""


# A single file whose encoders are broken.


@pytest.mark.parametrize("broken", ["link", "part"])
def test_t5_beside_a_file_that_is_broken(broken: str, source: Path, tmp_path: Path) -> None:
    """It is not built without T5 unasked."""
    file = write_single(source, tmp_path / "sd3.5.safetensors", ("transformer",))
    t5 = file.parent / "clip" / "t5xxl_fp16.safetensors"
    if broken == "link":
        t5.unlink()
        t5.symlink_to("/mnt/t5")
    else:
        t5.rename(t5.with_name(t5.name + ".part"))
    with pytest.raises(CheckpointError, match=r"t5xxl_fp16.*--no-t5"):
        look(ModelOptions(str(file)))
    assert "t5" not in look(ModelOptions(str(file), without_t5=True)).components
