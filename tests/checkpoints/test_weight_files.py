"""Variants, shards and listed parts: what diffusers and transformers read, or one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sd35_trt.checkpoints.look import look, look_at_structure
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.weight_files import weight_files
from sd35_trt.checkpoints.weights import folder_weights
from sd35_trt.components import COMPONENTS
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path

STEMS = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(params=STEMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A part's folder, empty: one that diffusers reads, and one that transformers reads."""
    (tmp_path / request.param).mkdir()
    return Path(tmp_path / request.param)


def fill(folder: Path, *names: str) -> list[Path]:
    """Files under names in which STEM stands for the folder's; indexes list all shards."""
    stem = STEMS[folder.name]
    paths = [folder / name.replace("STEM", stem) for name in names]
    shards = [path for path in paths if "-of-" in path.name]
    for number, path in enumerate(paths):
        if path.suffix == ".json":
            listed = {f"tensor{i}": shard.name for i, shard in enumerate(shards)}
            path.write_text(json.dumps({"weight_map": listed}))
        else:
            save_file({f"tensor{number}": torch.zeros(2)}, path)
    return [path for path in paths if path.suffix != ".json"]


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        weight_files(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert " — " in message
    for word in words:
        assert word in message, message


ONE, TWO = "00001-of-00002", "00002-of-00002"


@pytest.mark.parametrize(
    "names",
    [
        ("STEM.safetensors",),
        ("STEM.fp16.safetensors",),
        ("STEM.bf16.safetensors",),
        ("STEM.fp8.safetensors",),
        (f"STEM-{ONE}.safetensors", f"STEM-{TWO}.safetensors", "STEM.safetensors.index.json"),
        *(
            (f"STEM.fp16-{ONE}.safetensors", f"STEM.fp16-{TWO}.safetensors", f"STEM.{index}.json")
            for index in ("safetensors.index.fp16", "safetensors.fp16.index",
                          "fp16.safetensors.index")
        ),
        (f"STEM-{ONE}.fp16.safetensors", f"STEM-{TWO}.fp16.safetensors",
         "STEM.safetensors.fp16.index.json"),
        # Without an index.
        (f"STEM-{ONE}.safetensors", f"STEM-{TWO}.safetensors"),
        (f"STEM.fp16-{ONE}.safetensors", f"STEM.fp16-{TWO}.safetensors"),
        (f"STEM-{ONE}.fp16.safetensors", f"STEM-{TWO}.fp16.safetensors"),
        ("STEM-00001-of-00001.safetensors",),
    ],
    ids=lambda names: names[-1],
)  # fmt: skip
def test_spellings(names: tuple[str, ...], folder: Path) -> None:
    expected = fill(folder, *names)
    assert weight_files(folder) == expected
    assert all(f"tensor{i}" in folder_weights(folder.name, folder) for i in range(len(expected)))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("STEM.safetensors", "STEM.fp16.safetensors"), "STEM.safetensors"),
        (("STEM.bf16.safetensors", "STEM.fp16.safetensors"), "STEM.fp16.safetensors"),
        (("STEM.non_ema.safetensors", "STEM.safetensors"), "STEM.safetensors"),
        (("STEM.fp16.safetensors", "STEM.ema.safetensors"), "STEM.fp16.safetensors"),
        (("STEM.fp16.safetensors", "STEM-00001-of-00001.safetensors"),
         "STEM-00001-of-00001.safetensors"),
        (("STEM.safetensors", "STEM-00001-of-00002.safetensors"), "STEM.safetensors"),
        (("STEM.safetensors", "other.safetensors"), "STEM.safetensors"),
        (("STEM.safetensors", "diffusion_pytorch_model.fp16.safetensors"), "STEM.safetensors"),
    ],
)  # fmt: skip
def test_where_several_could_be_meant(names: tuple[str, ...], taken: str, folder: Path) -> None:
    fill(folder, *names)
    assert weight_files(folder) == [folder / taken.replace("STEM", STEMS[folder.name])]


def tiny(part: str, value: float) -> torch.nn.Module:
    if part == "vae":
        model: torch.nn.Module = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    else:
        model = CLIPTextModelWithProjection(
            CLIPTextConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                           num_attention_heads=1, max_position_embeddings=4, projection_dim=4)
        )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def test_the_same_as_diffusers_and_transformers(folder: Path) -> None:
    """Each is saved with a value of its own: plain, its shards, and a variant beside them."""
    part = folder.name
    kind = AutoencoderKL if part == "vae" else CLIPTextModelWithProjection
    shards = folder.parent / "shards"
    tiny(part, 2.0).save_pretrained(shards, max_shard_size="0.5KB")  # type: ignore[operator]
    tiny(part, 3.0).save_pretrained(folder, variant="fp16")  # type: ignore[operator]
    tiny(part, 1.0).save_pretrained(folder.parent / "plain")  # type: ignore[operator]
    for source in (folder.parent / "plain", shards):
        for path in source.iterdir():
            shutil.copy(path, folder)
    assert len(list(shards.glob("*-of-*"))) > 1
    model = kind.from_pretrained(folder)
    weights = folder_weights(folder.name, folder)
    for name, tensor in model.state_dict().items():
        if name in weights:
            assert torch.equal(weights.read(name), tensor), name
    assert next(model.parameters()).flatten()[0] == (2.0 if part == "vae" else 1.0)


# What is refused.


def test_shards_that_are_missing(folder: Path) -> None:
    stem = STEMS[folder.name]
    paths = fill(folder, f"STEM-{ONE}.safetensors", f"STEM-{TWO}.safetensors",
                 "STEM.safetensors.index.json")  # fmt: skip
    paths[1].rename(folder / f"{paths[1].name}.incomplete")
    refused(folder, f"{paths[1]} is missing: its download did not finish", ".incomplete")
    (folder / f"{stem}.safetensors.index.json").unlink()
    refused(folder, f"{paths[1]} is missing")
    (folder / f"{paths[1].name}.incomplete").unlink()
    refused(folder, f"{paths[1]} is missing")
    paths[1].symlink_to("/gone")
    refused(folder, f"{paths[1]} is a dangling link to /gone")
    fill(folder, "STEM-00001-of-00003.safetensors")
    refused(folder, "shards of several sets (00002 and 00003)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", ("has no weight_map",)),
        ('{"weight_map": {"a": "../secret.safetensors"}}', ("'../secret.safetensors'",)),
        ('{"weight_map": {"a": 5}}', ("5 is missing",)),
        ("", ("an empty file",)),
        ("version https://git-lfs.github.com/spec/v1\nsize 9\n", ("a Git LFS pointer",)),
    ],
)
def test_an_index_that_is_none(content: str, words: tuple[str, ...], folder: Path) -> None:
    (folder / f"{STEMS[folder.name]}.safetensors.index.json").write_text(content)
    refused(folder, *words)


def test_variants_that_are_not_told_apart(folder: Path) -> None:
    fill(folder, "STEM.ema.safetensors", "STEM.non_ema.safetensors")
    refused(folder, "the variants ema, non_ema", f"as {STEMS[folder.name]}.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_model.bin",),
        ("diffusion_pytorch_model.bin",),
        ("diffusion_pytorch_model.fp16.bin",),
        ("pytorch_model.bin.index.json", f"pytorch_model-{ONE}.bin", f"pytorch_model-{TWO}.bin"),
    ],
)
def test_pickles_alone(names: tuple[str, ...], folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    for name in names:
        torch.save({"a": torch.zeros(2)}, folder / name)
    refused(folder, ".bin, which is a pickle", "from_pretrained(DIR).save_pretrained(NEW)")


@pytest.mark.parametrize("name", ["model.onnx", "flax_model.msgpack", "model.gguf"])
def test_other_formats_alone(name: str, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    refused(folder, "holds no .safetensors file")
    (folder / name).write_bytes(b"GGUF" if name.endswith("gguf") else b"\x08\x01\xff")
    refused(folder, f"holds no .safetensors file but {name}")


def test_a_file_under_another_name(folder: Path) -> None:
    fill(folder, "clip_l.safetensors")
    refused(
        folder,
        "clip_l.safetensors, and no",
        f"rename the file that is meant to {STEMS[folder.name]}",
    )


# Parts that model_index.json lists.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of mini to change."""
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))


def relist(model: Path, **values: object) -> None:
    path = model / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def hollow(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unlink(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("/mnt/t5")


ABSENT = {remove: "is missing", hollow: "is an empty folder", unlink: "a dangling link to /mnt/t5"}


@pytest.mark.parametrize("absent", ABSENT, ids=lambda absent: absent.__name__)
@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3", "text_encoder", "tokenizer"])
def test_listed_but_absent(part: str, absent, model: Path) -> None:  # type: ignore[no-untyped-def]
    absent(model / part)
    with pytest.raises(CheckpointError) as caught:
        look(ModelOptions(str(model)))
    message = str(caught.value)
    assert f"{model / part} {ABSENT[absent]}" in message or (
        f"{model / part} is {ABSENT[absent]}" in message
    )
    assert ("--no-t5" in message) == part.endswith("_3")
    if part.endswith("_3"):
        assert "t5" not in look(ModelOptions(str(model), without_t5=True)).components


@pytest.mark.parametrize("name", ["vae/config.json", "tokenizer/vocab.json", "tokenizer_3/x.json"])
def test_small_files_that_are_broken(name: str, model: Path) -> None:
    """Each is read by the look, before any work."""
    path = model / name
    path.unlink(missing_ok=True)
    path.symlink_to("/mnt/gone")
    with pytest.raises(CheckpointError, match=f"{path} is a dangling link to /mnt/gone"):
        look(ModelOptions(str(model)))
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 900\n")
    with pytest.raises(CheckpointError, match=f"{path} is a Git LFS pointer to 900 B"):
        look(ModelOptions(str(model)))


def test_t5_without_its_weights(model: Path) -> None:
    (model / "text_encoder_3" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file .*--no-t5"):
        look(ModelOptions(str(model)))
    assert "t5" not in look(ModelOptions(str(model), without_t5=True)).components


@pytest.mark.parametrize("value", [None, [None, None]])
def test_not_listed(value: object, model: Path) -> None:
    """Without T5, whether or not its folder is there."""
    relist(model, text_encoder_3=value, tokenizer_3=value)
    components = [name for name in COMPONENTS if name != "t5"]
    assert look(ModelOptions(str(model))).components == components
    remove(model / "text_encoder_3")
    remove(model / "tokenizer_3")
    assert look(ModelOptions(str(model))).components == components


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2", "tokenizer_3"])
def test_a_part_that_must_be_listed(part: str, model: Path) -> None:
    relist(model, **{part: [None, None]})
    with pytest.raises(CheckpointError, match=rf"model_index\.json lists no {part} — "):
        look(ModelOptions(str(model)))


def test_t5_is_left_out_on_request() -> None:
    assert "t5" in look(ModelOptions()).components
    assert "t5" not in look(ModelOptions(without_t5=True)).components
    assert "t5" in look_at_structure(ModelOptions("large")).components
    assert "t5" not in look_at_structure(ModelOptions("large", without_t5=True)).components


@pytest.mark.parametrize(
    ("function", "command"),
    [
        ("sd35_trt.build.build", ("build",)),
        ("sd35_trt.calibration.calibrate.calibrate", ("calibrate", "--out", "scales")),
        ("sd35_trt.planning.run.plan", ("plan", "--gpu", "rtx4060")),
    ],
)
def test_the_option(
    function: str, command: tuple[str, ...], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = []

    def stop(options: Any, *report: object) -> None:
        wishes.append(options.without_t5)
        raise CheckpointError("enough")

    monkeypatch.setattr(function, stop)
    for more in ((), ("--no-t5",)):
        run(*command, *more)
    assert wishes == [False, True]


@pytest.mark.parametrize(
    "task", ["", "Img2Img", "Inpaint", "PAG", "PAGImg2Img", "ControlNet", "ControlNetInpainting"]
)
def test_pipelines_of_the_same_model(task: str, model: Path) -> None:
    import diffusers

    name = f"StableDiffusion3{task}Pipeline"
    assert hasattr(diffusers, name)
    relist(model, _class_name=name)
    assert look(ModelOptions(str(model))).components == list(COMPONENTS)


@pytest.mark.parametrize("name", ["StableDiffusion3", "FluxPipeline", "StableDiffusion3PAG", 3])
def test_pipelines_of_another_model(name: object, model: Path) -> None:
    relist(model, _class_name=name)
    with pytest.raises(CheckpointError, match=f"is a {name} in diffusers' layout, not Stable"):
        look(ModelOptions(str(model)))
