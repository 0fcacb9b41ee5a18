"""Parts that are named stand in place of a model's own."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import one_error_line
from originals import original, part_tensors, save, write_single
from random_checkpoints import Layout, kept_checkpoint
from safetensors.torch import load_file, save_file

from sd35_trt.build import BuildOptions
from sd35_trt.checkpoints.beside import OPTIONS
from sd35_trt.checkpoints.identity import folder_files
from sd35_trt.checkpoints.look import look, look_at_structure
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.mini import checkpoint_path
from sd35_trt.store.cache import StageCache

FIELDS = dict(zip(OPTIONS, ("clip_l", "clip_g", "t5", "vae"), strict=True))


@pytest.fixture(scope="module")
def source(stage_cache: Path) -> Path:
    """A random checkpoint; what shapes do not show is as published."""
    return kept_checkpoint(StageCache(stage_cache), "large", Layout(published=True))


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    """Its transformer in the original layout, the other parts beside it."""
    return write_single(source, tmp_path / "models" / "some.safetensors", ["transformer"])


@pytest.mark.parametrize("form", ["original", "transformers", "folder", "model"])
@pytest.mark.parametrize("base", ["directory", "file"])
@pytest.mark.parametrize("part", OPTIONS)
def test_a_part(part: str, base: str, form: str, source: Path, file: Path, tmp_path: Path) -> None:
    """Files in either spelling, a part's folder, and a model directory that has one."""
    model = source if base == "directory" else file
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (stored,) = (other / part).glob("*.safetensors")
    tensors = {name: tensor + 1 for name, tensor in load_file(stored).items()}
    save_file(tensors, stored)
    own = tmp_path / "trained.safetensors"
    if form == "original":
        save(original(other, part), own)
    elif form == "transformers":
        save(part_tensors(other, part), own)
    path = {"folder": other / part, "model": other}.get(form, own)
    options = ModelOptions(str(model), **{FIELDS[part]: path})
    assert options.parts == {part: path}
    checkpoint = look(options).checkpoint
    # SD3.5's original loaders leave out a projection in a file of CLIP-L.
    leaves_out = part == "text_encoder" and path == own
    for reader in (checkpoint, pickle.loads(pickle.dumps(checkpoint))):  # noqa: S301 (ours)
        for name, tensor in tensors.items():
            if not (leaves_out and name == "text_projection.weight"):
                assert torch.equal(reader.weights(part).read(name), tensor), name
    expected = [own] if path == own else [other / part / "config.json", stored]
    assert list(folder_files(checkpoint, [part]).values()) == expected
    assert checkpoint.place(part) == expected[0]
    others = [folder for folder in (*OPTIONS, "transformer") if folder != part]
    plain = look(ModelOptions(str(model))).checkpoint
    assert folder_files(checkpoint, others) == folder_files(plain, others)


def test_t5_for_a_model_without(source: Path, file: Path, tmp_path: Path) -> None:
    shutil.move(file.parent / "clip", tmp_path / "elsewhere")
    assert not look(ModelOptions(str(file))).checkpoint.has("text_encoder_3")
    path = tmp_path / "elsewhere" / "t5xxl_fp16.safetensors"
    assert "t5" in look(ModelOptions(str(file), t5=path)).components


def test_a_name_decides_between_several(source: Path, file: Path) -> None:
    clips = [file.parent / f"{name}_clip_l.safetensors" for name in "ab"]
    for path in clips:
        save(original(source, "text_encoder"), path)
    shutil.rmtree(file.parent / "text_encoders")
    save(original(source, "text_encoder_2"), file.parent / "clip_g.safetensors")
    with pytest.raises(CheckpointError, match="--clip-l FILE"):
        look(ModelOptions(str(file)))
    checkpoint = look(ModelOptions(str(file), clip_l=clips[1])).checkpoint
    assert checkpoint.files("text_encoder") == [clips[1]]


def test_what_is_no_such_part(source: Path, tmp_path: Path) -> None:
    root = str(checkpoint_path())

    def refused(kind: type[Exception], words: str, **given: Path) -> None:
        with pytest.raises(kind, match=words) as caught:
            look(ModelOptions(root, **given))
        assert "\n" not in str(caught.value)

    refused(
        UsageError, "--clip-l: .*none.safetensors is missing", clip_l=tmp_path / "none.safetensors"
    )
    refused(UsageError, "--vae: .* has no config.json", vae=tmp_path)
    lora = save({"lora_te.weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    refused(CheckpointError, "lora.safetensors is a LyCORIS adapter, not the model's T5", t5=lora)
    refused(CheckpointError, "is a file of autoencoder, not the model's T5", t5=save(
        original(source, "vae"), tmp_path / "vae.safetensors"))  # fmt: skip
    refused(CheckpointError, "has the class T5EncoderModel, not CLIPTextModelWithProjection",
            clip_g=source / "text_encoder_3")  # fmt: skip
    # Sound, but not this model's.
    refused(CheckpointError, r"\(128 \+ 96\) put out 224 channels, .* takes 160",
            clip_l=source / "text_encoder")  # fmt: skip


def test_mini_with_another_part_is_another_model(tmp_path: Path) -> None:
    """Its packaged calibration is of its own parts."""
    copy = shutil.copytree(checkpoint_path() / "vae", tmp_path / "vae")
    assert not look(ModelOptions(vae=copy)).packaged
    assert look(ModelOptions()).packaged


def test_published_models_have_no_other_parts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--t5 needs a checkpoint"):
        look_at_structure(ModelOptions("large", t5=tmp_path))


def test_advice_repeats_them() -> None:
    options = BuildOptions(model="ft.safetensors", clip_l=Path("a b.safetensors"), vae=Path("v"))
    words = "--model ft.safetensors --clip-l 'a b.safetensors' --vae v"
    assert options.model_words == words


def test_commands(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    missing = tmp_path / "none.safetensors"
    for command in (
        ["build", "--gpu", "cpu"], ["calibrate", "--out", tmp_path / "out"],
        ["plan", "--gpu", "cpu"],
    ):  # fmt: skip
        for option in OPTIONS.values():
            status, out, err = run(*command, option, missing)
            assert (status, out) == (2, "")
            assert f"{option}: {missing} is missing" in one_error_line(err)
    vae = shutil.copytree(checkpoint_path() / "vae", tmp_path / "vae")
    config = vae / "config.json"
    changed = {**json.loads(config.read_text()), "sample_size": 64}
    config.write_text(json.dumps(changed))
    status, out, _ = run("plan", "--gpu", "cpu", "--vae", vae, "--json")
    assert status == 0
    assert json.loads(out)["model"] == "mini"


@pytest.mark.nightly
def test_a_build(  # type: ignore[no-untyped-def]
    run, stage_cache: Path, mini_bundle: Path, tmp_path: Path
) -> None:
    """The stages of the other parts are taken from the cache; the manifest has the file."""
    vae = Path(shutil.copytree(checkpoint_path() / "vae", tmp_path / "vae"))
    (stored,) = vae.glob("*.safetensors")
    tensors = load_file(stored)
    tensors["decoder.conv_out.bias"] += 0.25
    save_file(tensors, stored)
    out = tmp_path / "bundle"
    status, _, err = run(
        "build", "--policy", "fp32", "--vae", vae, "--out", out, "--cache-dir", stage_cache
    )
    assert status == 0
    assert f"autoencoder  {stored}" in err
    ours = json.loads((out / "bundle.json").read_text())["model"]["files"]
    base = json.loads((mini_bundle / "bundle.json").read_text())["model"]["files"]
    different = {name for name in ours if ours[name] != base[name]}
    assert different == {f"vae/{stored.name}"}
