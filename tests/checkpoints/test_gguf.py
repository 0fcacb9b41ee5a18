"""GGUF files: values as ``gguf`` dequantizes them, names, layouts, and what is refused."""

from __future__ import annotations

import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from conftest import relative_error
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter
from gguf_files import KINDS, Tensors, llama_names, t5_metadata, write_gguf, write_types
from originals import PARTS, PREFIXES, original, part_tensors, save, write_single
from random_checkpoints import Layout, kept_checkpoint

from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.checkpoints.gguf import GgufFile
from sd35_trt.checkpoints.gguf_reader import Reader
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.single_file import open_checkpoint
from sd35_trt.errors import Sd35Error
from sd35_trt.export.component import build_part, fake_tensors
from sd35_trt.formats.bundle import Bundle
from sd35_trt.store.cache import StageCache

STEM = "sd3.5_thing"
T5 = "t5-v1_1-xxl-encoder-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def source(stage_cache: Path) -> Path:
    """A random Medium in the diffusers layout."""
    return kept_checkpoint(StageCache(stage_cache), "medium", Layout(published=True))


@pytest.fixture(scope="module")
def transformer(source: Path) -> Tensors:
    return original(source, "transformer")


@pytest.fixture(scope="module")
def t5(source: Path) -> Tensors:
    return original(source, "text_encoder_3")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """What lies beside a transformer, but for T5."""
    path = tmp_path / "models"
    write_single(source, path / "removed.safetensors", ("transformer",)).unlink()
    shutil.rmtree(path / "clip")
    return path


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / f"{STEM}.gguf"


def assert_same(part: str, file: Path, values: Tensors, source: Path, tmp_path: Path) -> None:
    """A part's tensors and configuration are those of a .safetensors file with these values.

    Args:
        source: has a part of the same structure.
    """
    twin = tmp_path / "twin"
    shutil.copytree(file.parent, twin, ignore=shutil.ignore_patterns("*.gguf"))
    if part == "transformer":
        save(values, twin / f"{STEM}.safetensors")
    else:
        shutil.copy(file, twin)
        save(values, twin / "t5xxl.safetensors")
    actual = open_checkpoint(file)
    (model,) = twin.glob(f"{STEM}.*")
    expected = open_checkpoint(model)
    assert actual.config(part) == expected.config(part)
    ours, theirs = actual.weights(part), expected.weights(part)
    with fake_tensors():
        build_part(part, actual)
    for name in part_tensors(source, part):
        read = ours.read(name)
        assert torch.equal(read.float(), theirs.read(name)), name
        assert ours.shape(name) == tuple(read.shape) == theirs.shape(name), name
    shutil.rmtree(twin)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str, transformer: Tensors, tmp_path: Path) -> None:
    """Bit for bit as ``gguf`` dequantizes; in half precision where it is stored so."""
    path = tmp_path / "model.gguf"
    values = write_gguf(transformer, path, kind)
    tensors = GgufFile(path)
    assert tensors.names == values.keys()
    for name, value in values.items():
        assert torch.equal(tensors.values(name).float(), value), name
        assert tensors.shape(name) == tuple(transformer[name].shape), name
    assert kind in tensors.quantization
    name = "joint_blocks.0.x_block.mlp.fc2.weight"
    assert tensors.dtype(name) == kind
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert tensors.values(name).dtype == stored.get(kind, torch.float32)


@pytest.mark.parametrize("architecture", ["t5encoder", "t5", "pig", None])
def test_t5(
    architecture: str | None, source: Path, transformer: Tensors, t5: Tensors, file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """By llama.cpp's names; by transformers' where the architecture is not llama.cpp's."""
    rename = llama_names if architecture in ("t5", "t5encoder") else dict
    write_gguf(transformer, file)
    texts = write_gguf(rename(t5), file.parent / T5, "Q5_K", architecture)
    spellings = dict(zip(rename(t5), t5, strict=True))
    texts = {spellings[name]: tensor for name, tensor in texts.items()}
    assert_same("text_encoder_3", file, texts, source, tmp_path)


LAYOUTS = {
    "with ComfyUI's prefix": {"prefix": "model.diffusion_model."},
    "without an architecture": {"architecture": None},
    "rows of 256": {"reshaped": True},
    "rows of 256, with a prefix": {"reshaped": True, "prefix": "model.diffusion_model."},
    "a table without its leading dimension": {"flat": True},
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case: str, source: Path, transformer: Tensors, file: Path, tmp_path: Path) -> None:
    options = dict(LAYOUTS[case])
    prefix, flat = options.pop("prefix", ""), options.pop("flat", False)
    tensors = {prefix + name: tensor for name, tensor in transformer.items()}
    table = f"{prefix}pos_embed"
    if flat:
        tensors[table] = tensors[table][0]
    values = write_gguf(tensors, file, "Q4_K", **options)  # type: ignore[arg-type]
    values[table] = values[table].reshape(transformer["pos_embed"].shape)
    fields = GGUFReader(file).fields
    assert any(key.startswith("comfy.gguf.orig_shape.") for key in fields) == ("rows" in case)
    assert_same("transformer", file, values, source, tmp_path)


def test_a_whole_model(source: Path, tmp_path: Path) -> None:
    """As stable-diffusion.cpp converts one: all parts in a file, by the original's names."""
    file = tmp_path / f"{STEM}.gguf"
    tensors = {
        PREFIXES[part] + name: tensor
        for part in PARTS
        for name, tensor in original(source, part).items()
    }
    values = write_gguf(tensors, file, "Q5_1", architecture=None)
    twin = save(values, file.with_suffix(".safetensors"))
    actual, expected = open_checkpoint(file), open_checkpoint(twin)
    for part in PARTS:
        assert actual.config(part) == expected.config(part)
        for name in part_tensors(source, part):
            read = actual.weights(part).read(name)
            assert torch.equal(read.float(), expected.weights(part).read(name)), (part, name)
        assert actual.files(part) == [file]


def test_llama_names_are_the_librarys(t5: Tensors) -> None:
    """What these tests write is what llama.cpp's converter makes of transformers' names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    for ours, theirs in zip(t5, llama_names(t5), strict=True):
        assert names.get_name(ours, (".weight",)) == theirs


def test_t5_beside_a_safetensors_model(
    source: Path, t5: Tensors, tmp_path: Path, transformer: Tensors
) -> None:
    """In ComfyUI's folder, whatever its name's letters; FP16 in .safetensors comes first."""
    file = write_single(
        source, tmp_path / "models" / "unet" / f"{STEM}.safetensors", ("transformer",)
    )
    shutil.rmtree(file.parent / "clip")
    assert not open_checkpoint(file).has("text_encoder_3")
    place = tmp_path / "models" / "text_encoders" / "T5XXL_q8_0.GGUF"
    write_gguf(llama_names(t5), place, "Q8_0", "t5")
    checkpoint = open_checkpoint(file)
    assert checkpoint.files("text_encoder_3") == [place]
    save(t5, file.parent / "t5xxl_fp16.safetensors")
    assert open_checkpoint(file).files("text_encoder_3")[0].name == "t5xxl_fp16.safetensors"


def test_metadata_is_read_as_the_library_reads_it(
    t5: Tensors, source: Path, tmp_path: Path
) -> None:
    path, config = tmp_path / T5, Checkpoint(source).config("text_encoder_3")
    write_gguf(
        llama_names(t5), path, architecture="t5encoder", extra=lambda w: t5_metadata(w, config)
    )
    ours, theirs = Reader(path), GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert ours.fields[key].contents() == field.contents()
        assert ours.fields[key].types == field.types
    assert [t.data_offset for t in ours.tensors] == [t.data_offset for t in theirs.tensors]
    # The library makes a part of each number; this reader takes an array as one.
    assert len(ours.fields["tokenizer.ggml.precompiled_charsmap"].parts) < 10


def test_memory(transformer: Tensors, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dequantized tensor is held at a time."""
    write_gguf(transformer, file, "Q4_K")
    monkeypatch.setattr("sd35_trt.checkpoints.gguf._CHUNK", 1 << 12)
    tensors = GgufFile(file)
    largest = 4 * max(tensor.numel() for tensor in transformer.values())
    total = 4 * sum(tensor.numel() for tensor in transformer.values())
    tensors.values("joint_blocks.0.x_block.mlp.fc2.weight")  # imports
    tracemalloc.start()
    for name in tensors.names:
        tensors.values(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 5 * largest
    assert peak < 2 * largest


def test_a_fused_projection_is_dequantized_once(
    transformer: Tensors, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(transformer, file)
    calls = []
    monkeypatch.setattr(
        gguf, "dequantize", lambda *a: calls.append(a) or gguf.quants.dequantize(*a)
    )
    weights = open_checkpoint(file).weights("transformer")
    calls.clear()
    for letter in "qkv":
        for parameter in ("weight", "bias"):
            weights.read(f"transformer_blocks.1.attn.to_{letter}.{parameter}")
    assert len(calls) == 1


# As other libraries read the same files.


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_diffusers(kind: str, source: Path, transformer: Tensors, file: Path) -> None:
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    write_gguf(transformer, file, kind)
    model = SD3Transformer2DModel.from_single_file(
        str(file), config=str(source), subfolder="transformer", torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    weights = open_checkpoint(file).weights("transformer")
    parameters = dict(model.named_parameters())
    assert sum(isinstance(p, GGUFParameter) for p in parameters.values()) > 20
    for name, parameter in parameters.items():
        quantized = isinstance(parameter, GGUFParameter)
        theirs = dequantize_gguf_tensor(parameter) if quantized else parameter
        # diffusers dequantizes in FP16.
        assert relative_error(weights.read(name), theirs.detach()) < 2**-9, name


def test_transformers(t5: Tensors, transformer: Tensors, source: Path, file: Path) -> None:
    from transformers import T5EncoderModel

    config = Checkpoint(source).config("text_encoder_3")
    write_gguf(transformer, file)
    write_gguf(
        llama_names(t5), file.parent / T5, "Q4_K", "t5encoder",
        extra=lambda writer: t5_metadata(writer, config),
    )  # fmt: skip
    model = T5EncoderModel.from_pretrained(file.parent, gguf_file=T5)
    weights = open_checkpoint(file).weights("text_encoder_3")
    parameters = dict(model.named_parameters())
    assert len(parameters) > 15
    for name, parameter in parameters.items():
        assert torch.equal(weights.read(name).float(), parameter), name


# What is refused, by the look.


def refused(model: Path, *words: str) -> None:
    with pytest.raises(Sd35Error) as caught:
        look(ModelOptions(str(model)))
    message = str(caught.value)
    assert "\n" not in message
    assert " — " in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("architecture", ["flux", "sdxl", "llama"])
def test_another_architecture(architecture: str, transformer: Tensors, file: Path) -> None:
    write_gguf(transformer, file, architecture=architecture)
    refused(file, str(file), repr(architecture), "architecture sd3")


def test_the_wrong_tensors(t5: Tensors, transformer: Tensors, file: Path) -> None:
    write_gguf({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 32)}, file)
    refused(file, "is FLUX", "not Stable Diffusion 3.5")
    write_gguf(llama_names(t5), file, architecture="t5encoder")
    refused(file, "T5", "not Stable Diffusion 3.5")
    write_gguf(transformer, file)
    write_gguf(transformer, file.parent / T5)
    refused(file, T5, "not the model's T5")


def test_umt5(transformer: Tensors, t5: Tensors, file: Path) -> None:
    write_gguf(transformer, file)
    tensors = llama_names(t5)
    tensors["enc.blk.1.attn_rel_b.weight"] = tensors["enc.blk.0.attn_rel_b.weight"]
    write_gguf(tensors, file.parent / T5, architecture="t5encoder")
    refused(file, T5, "UMT5")


def test_several_t5(transformer: Tensors, t5: Tensors, file: Path) -> None:
    write_gguf(transformer, file)
    for name in (T5, "clip/t5xxl-q8_0.gguf"):
        write_gguf(llama_names(t5), file.parent / name, architecture="t5encoder")
    refused(file, "2 files could be its T5", T5, "t5xxl-q8_0.gguf", "--t5 FILE")
    (file.parent / T5).unlink()
    (file.parent / T5).symlink_to("clip/t5xxl-q8_0.gguf")
    assert look(ModelOptions(str(file))).checkpoint.has("text_encoder_3")


def test_a_missing_part(transformer: Tensors, file: Path) -> None:
    write_gguf(transformer, file)
    (file.parent / "text_encoders" / "clip_l.safetensors").unlink()
    refused(file, f"{file} has no CLIP-L", "no clip_l.safetensors", "--clip-l FILE")


def test_shards(transformer: Tensors, file: Path) -> None:
    write_gguf(transformer, file, extra=lambda w: w.add_uint16("split.count", 3))
    refused(file, str(file), "one of 3 shards", "--merge")
    write_gguf(transformer, file, extra=lambda w: w.add_uint16("split.count", 1))
    assert look(ModelOptions(str(file))).variant.name == "custom"


def test_big_endian(transformer: Tensors, file: Path) -> None:
    write_gguf(transformer, file, "F32", endian=GGUFEndian.BIG)
    refused(file, str(file), "big-endian")


@pytest.mark.parametrize("kind", ["Q8_K", "F64", "I8", "I32"])
def test_types_that_are_not_dequantized(kind: str, transformer: Tensors, file: Path) -> None:
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    write_types(file, {name: GGMLQuantizationType[kind]}, "sd3")
    refused(file, str(file), name, kind, "Q8_0")


def test_integers_that_are_no_weights(transformer: Tensors, file: Path) -> None:
    """Such as CLIP's position ids, which nothing reads."""

    def extra(writer: GGUFWriter) -> None:
        ids = torch.arange(77, dtype=torch.int32).numpy()
        writer.add_tensor("position_ids", ids)

    write_gguf(transformer, file, extra=extra)
    assert look(ModelOptions(str(file))).components


def changed(file: Path, change: Callable[[bytes], bytes]) -> Path:
    file.write_bytes(change(file.read_bytes()))
    return file


def test_an_unknown_type(file: Path) -> None:
    """A type that later versions of ggml have, or that it has no more: Q4_0_4_4, number 31."""
    write_types(file, {"joint": GGMLQuantizationType.Q8_0}, "sd3")
    before, after = (
        b"joint"
        + b"".join(n.to_bytes(size, "little") for n, size in ((2, 4), (32, 8), (1, 8), (kind, 4)))
        for kind in (8, 31)
    )
    assert before in file.read_bytes()
    refused(changed(file, lambda data: data.replace(before, after)), "unknown type", "31", "Q8_0")


@pytest.mark.parametrize("size", [0, 3, 20, 100, 1000, 5000, -100_000, -4096, -1])
def test_truncated(size: int, transformer: Tensors, file: Path) -> None:
    write_gguf(transformer, file, extra=lambda w: w.add_token_list(["token"] * 200))
    refused(changed(file, lambda data: data[:size]), str(file), "truncated", "again")


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF" + bytes(100),
        b"GGUF" + (1).to_bytes(4, "little") + bytes(100),
        b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16 + bytes(100),
        # An array of arrays of arrays …
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
        + (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little")
        + ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000,
    ],
    ids=["zeros", "version 1", "counts", "nested"],
)  # fmt: skip
def test_no_gguf(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    refused(file, str(file), "no GGUF", "again")


def test_a_pointer(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    refused(file, str(file), "Git LFS pointer", "git lfs pull")


KEY = "comfy.gguf.orig_shape.context_embedder.bias"
METADATA: dict[str, tuple[Callable[[GGUFWriter], None], tuple[str, ...]]] = {
    "another number of values": (lambda w: w.add_array(KEY, [3, 5]), (KEY, "[3, 5]", "[128]")),
    "negative lengths": (lambda w: w.add_array(KEY, [-1, -128]), (KEY, "[-1, -128]")),
    "words": (lambda w: w.add_array(KEY, ["128"]), (KEY, "['128']")),
    "a number": (lambda w: w.add_uint32(KEY, 128), (KEY, "128")),
    "shards in words": (lambda w: w.add_string("split.count", "two"), ("shards", "two")),
    "an architecture in numbers": (
        lambda w: w.add_array("general.architecture", [1, 2]), ("architecture", "[1, 2]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_other_types(case: str, transformer: Tensors, file: Path) -> None:
    extra, words = METADATA[case]
    write_gguf(transformer, file, extra=extra)
    refused(file, str(file), *words)


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path("models/sd3.5.gguf"), "models/sd3.5.gguf is missing")
    Path("folder.gguf").mkdir()
    refused(Path("folder.gguf"), "folder.gguf")


def test_without_the_library(
    transformer: Tensors, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(transformer, file)
    monkeypatch.delitem(sys.modules, "sd35_trt.checkpoints.gguf_reader")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Sd35Error) as caught:
        GgufFile(file)
    assert str(caught.value) == "reading GGUF files needs gguf — pip install 'sd35-trt[build]'"


# What a build makes of it.


def test_what_a_bundle_says(transformer: Tensors, t5: Tensors, file: Path) -> None:
    write_gguf(transformer, file, "Q4_K")
    write_gguf(llama_names(t5), file.parent / T5, "Q6_K", "t5encoder")
    model = look(ModelOptions(str(file)))
    assert model.libraries == ("gguf",)
    assert set(model.quantization) == {f"transformer/{file.name}", f"text_encoder_3/{T5}"}
    counts = dict(
        reversed(c.split()) for c in model.quantization[f"text_encoder_3/{T5}"].split(", ")
    )
    assert sum(map(int, counts.values())) == len(llama_names(t5))
    assert set(counts) == {"Q6_K", "F32", "F16", "Q8_0"}
    assert look(ModelOptions()).quantization == {}


@pytest.mark.nightly
def test_a_build(
    source: Path, transformer: Tensors, t5: Tensors, file: Path, make_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """The engines are those of a .safetensors file with the same values."""
    values = write_gguf(transformer, file, "Q4_K")
    texts = write_gguf(llama_names(t5), file.parent / T5, "Q6_K", "t5encoder")
    twin = tmp_path / "twin"
    shutil.copytree(file.parent, twin, ignore=shutil.ignore_patterns("*.gguf"))
    save(values, twin / f"{STEM}.safetensors")
    spellings = dict(zip(llama_names(t5), t5, strict=True))
    save({spellings[n]: v for n, v in texts.items()}, twin / "t5xxl.safetensors")
    bundles = [
        Bundle.open(make_bundle(model=str(path), policy="half", size=(64, 128))).manifest
        for path in (file, twin / f"{STEM}.safetensors")
    ]
    ours, theirs = ([(c.name, c.files) for c in m.components] for m in bundles)
    assert ours == theirs
    assert set(bundles[0].model.quantization) == {
        f"transformer/{file.name}", f"text_encoder_3/{T5}",
    }  # fmt: skip
    assert "gguf" in bundles[0].versions
    assert "gguf" not in bundles[1].versions
    assert not bundles[1].model.quantization
