"""What one look at a model tells, and the hashes that identify it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sd35_trt.checkpoints.identity import difference, file_hashes
from sd35_trt.checkpoints.look import look, look_at_structure
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.components import COMPONENTS
from sd35_trt.dimensions import SizeLimits
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.formats.bundle import sha256_file
from sd35_trt.mini import checkpoint_path
from sd35_trt.store.cache import StageCache


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """mini's checkpoint, to be changed."""
    shutil.copytree(checkpoint_path(), tmp_path / "mini")
    return tmp_path / "mini"


def test_the_packaged_model(copy: Path) -> None:
    model = look(ModelOptions())
    assert (model.name, model.variant.name, model.packaged) == ("mini", "mini", True)
    assert model.components == list(COMPONENTS)
    assert model.parts == [
        "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"
    ]  # fmt: skip
    # A folder of that name is another model.
    other = look(ModelOptions(str(copy)))
    assert (other.name, other.packaged) == ("mini", False)


def test_published_models_need_no_checkpoint() -> None:
    model = look_at_structure(ModelOptions("large-turbo"))
    assert (model.name, model.variant.name) == ("large-turbo", "large-turbo")
    assert model.sizes == SizeLimits(unit=16, largest=192 * 16)
    with pytest.raises(CheckpointError):
        look(ModelOptions("large-turbo"))


def test_the_variant_by_name(copy: Path) -> None:
    """The folder's own: not one above it, nor what a fine-tune began with."""
    index = copy / "model_index.json"
    begun_with = {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}
    index.write_text(json.dumps({**json.loads(index.read_text()), **begun_with}))
    folder = copy.parent / "turbo-tests"
    folder.mkdir()
    model = copy.rename(folder / "mini")
    assert look(ModelOptions(str(model))).variant.name == "mini"
    turbo = model.rename(folder / "mini-turbo")
    assert (
        look(ModelOptions(str(turbo))).variant.steps,
        look(ModelOptions(str(turbo))).variant.guidance,
    ) == (4, 1.0)
    assert look(ModelOptions(str(turbo), variant="mini")).variant.name == "mini"
    with pytest.raises(UsageError, match=r"large has 38 blocks .* use: mini, custom"):
        look(ModelOptions(str(turbo), variant="large"))
    assert look_at_structure(ModelOptions("large", variant="large-turbo")).variant.steps == 4
    with pytest.raises(UsageError, match="medium has 24 blocks"):
        look_at_structure(ModelOptions("large", variant="medium"))


def test_sizes_that_a_model_draws() -> None:
    limits = SizeLimits.of({"pos_embed_max_size": 24})
    assert limits == SizeLimits(16, 384)
    for size in ((16, 384), (384, 16)):
        limits.check(*size)
    for width, height in ((8, 16), (16, 400), (24, 32), (0, 16)):
        with pytest.raises(UsageError, match=f"--size {width}x{height} is not within 16:384"):
            limits.check(width, height)
    for config in ({}, {"pos_embed_max_size": "24"}):
        with pytest.raises(CheckpointError, match="pos_embed_max_size"):
            SizeLimits.of(config)


def test_a_truncated_file_is_noticed(copy: Path) -> None:
    (path,) = (copy / "vae").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        look(ModelOptions(str(copy)))


def test_a_checkpoint_is_told_by_its_files(copy: Path, tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "cache")
    model = look(ModelOptions(str(copy)))
    hashes = file_hashes(model.checkpoint, model.parts, cache)
    assert hashes["vae/config.json"] == sha256_file(copy / "vae" / "config.json")
    assert {name.partition("/")[0] for name in hashes} == set(model.parts)
    assert difference(model.checkpoint, hashes, cache) is None
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert difference(model.checkpoint, hashes, cache) == "vae/config.json differs"
    without = look(ModelOptions(str(copy), without_t5=True))
    assert difference(without.checkpoint, hashes, cache).startswith("text_encoder_3/")
    config.unlink()
    assert difference(model.checkpoint, hashes, cache) == "vae/config.json is missing"
    with pytest.raises(CheckpointError, match=r"vae/config\.json is missing"):
        file_hashes(model.checkpoint, model.parts, cache)
