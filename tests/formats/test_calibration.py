"""The calibration artifact: comes back as written, and is refused where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import save
from safetensors.numpy import load_file, save_file

from sd35_trt.errors import UsageError
from sd35_trt.formats.calibration import (
    DESCRIPTION,
    FORMAT,
    TENSORS,
    Calibration,
    PolicyIdentity,
    Provenance,
)

FILES = {"transformer/config.json": "a" * 64, "transformer/model.safetensors": "b" * 64}
LAYERS = ["denoiser/blocks.0.attn.to_q", "denoiser/blocks.0.ff.net.2"]
ATTENTION = "denoiser/blocks.0.attn"


def calibration(**changes: Any) -> Calibration:
    fields: dict[str, Any] = {
        "inputs": dict(zip(LAYERS, (0.1, 3.0), strict=True)),
        "activations": {"denoiser/blocks.0": 20000.0, "t5/encoder.block.0": 1e5},
        "bmm": {f"{ATTENTION}.{x}": 1.0 + i for i, x in enumerate("qkvp")},
        "provenance": Provenance(files=FILES, steps=28, policy=PolicyIdentity("fp8", "c" * 64)),
    }
    return Calibration(**{**fields, **changes})


def refused(*words: str) -> Any:
    return pytest.raises(UsageError, match=".*".join(words))


@pytest.mark.parametrize("name", ["", TENSORS])
def test_comes_back_as_written(tmp_path: Path, name: str) -> None:
    expected = calibration()
    save(expected, tmp_path / "c")
    actual = Calibration.load(tmp_path / "c" / name)
    assert actual == expected
    assert actual.digest() == expected.digest()
    assert actual.inputs[LAYERS[0]] == float(np.float32(0.1))


def test_files_hold_the_names_of_the_contract(tmp_path: Path) -> None:
    save(calibration(), tmp_path / "c")
    tensors = load_file(tmp_path / "c" / TENSORS)
    assert {*tensors} == {
        *(f"{layer}.input_amax" for layer in LAYERS),
        "denoiser/blocks.0.output_amax", "t5/encoder.block.0.output_amax",
        *(f"{ATTENTION}.{x}_amax" for x in "qkvp"),
    }  # fmt: skip
    assert {(str(t.dtype), t.shape) for t in tensors.values()} == {("float32", ())}
    description = json.loads((tmp_path / "c" / DESCRIPTION).read_text())
    assert description["format"] == FORMAT
    assert description["steps"] == 28


def test_what_a_newer_version_wrote_is_kept(tmp_path: Path) -> None:
    save(calibration(), tmp_path / "c")
    path = tmp_path / "c" / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": {"a": [1, 2.5]}}))
    save(Calibration.load(tmp_path / "c"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / DESCRIPTION).read_text())["later"] == {"a": [1, 2.5]}


def test_saving_replaces_an_older_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    save(calibration(), tmp_path / "c")
    save(calibration(inputs={LAYERS[0]: 7.0}), tmp_path / "c")
    assert Calibration.load(tmp_path / "c").inputs == {LAYERS[0]: 7.0}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("field", ["inputs", "activations", "bmm"])
def test_digest_sees_every_value(field: str) -> None:
    first = calibration()
    name, value = next(iter(getattr(first, field).items()))
    changed = {**getattr(first, field), name: float(np.nextafter(np.float32(value), np.float32(0)))}
    assert calibration(**{field: changed}).digest() != first.digest()
    assert calibration(provenance=Provenance()).digest() == first.digest()


def test_missing(tmp_path: Path) -> None:
    with refused("not a calibration", "sd35-trt calibrate"):
        Calibration.load(tmp_path)
    save(calibration(), tmp_path / "c")
    (tmp_path / "c" / TENSORS).unlink()
    with refused(TENSORS, "missing"):
        Calibration.load(tmp_path / "c")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    save(calibration(), tmp_path / "c")
    path = tmp_path / "c" / TENSORS
    path.write_bytes(path.read_bytes()[:keep])
    with refused(TENSORS, "truncated or damaged"):
        Calibration.load(tmp_path / "c")


def test_scalars_of_another_artifact(tmp_path: Path) -> None:
    save(calibration(), tmp_path / "c")
    save_file({f"{LAYERS[0]}.input_amax": np.float32([2.0])}, tmp_path / "c" / TENSORS)
    with refused("digest differs"):
        Calibration.load(tmp_path / "c")
    save_file({f"{LAYERS[0]}.input_amax": np.float32([2.0, 3.0])}, tmp_path / "c" / TENSORS)
    with refused("damaged"):
        Calibration.load(tmp_path / "c")
    save_file({"weight": np.float32([2.0])}, tmp_path / "c" / TENSORS)
    with refused("unknown tensor 'weight'"):
        Calibration.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "cannot be read"),
        ("[]", "lacks or misstates"),
        ('{"format": "1"}', "lacks or misstates.*format"),
        ('{"format": 1, "steps": "28"}', r"lacks or misstates.*int.*\$\.steps"),
        ('{"format": 1, "guidance": NaN}', "cannot be read"),
        ('{"format": 1, "later": ' + "[" * 100_000, "cannot be read"),
        (
            '{"format": 1, "latents": {"sigma": [1], "mean": [], "deviation": []}}',
            "as many sigmas as means",
        ),
        ('{"format": 99}', "upgrade sd35-trt"),
        ('{"format": 0}', "make it again"),
    ],
)
def test_foreign_description(tmp_path: Path, text: str, word: str) -> None:
    save(calibration(), tmp_path / "c")
    (tmp_path / "c" / DESCRIPTION).write_text(text)
    with refused(word):
        Calibration.load(tmp_path / "c")


def test_check_accepts_its_own_checkpoint_and_policy() -> None:
    calibration().check(FILES, reversed(LAYERS), [ATTENTION])
    calibration().check({"transformer/config.json": "a" * 64}, LAYERS, [ATTENTION])
    calibration(bmm={}).check(FILES, LAYERS)


def test_another_checkpoint() -> None:
    for files in ({**FILES, "transformer/config.json": "c" * 64}, {"vae/config.json": "d" * 64}):
        with refused("another checkpoint", "config.json differs", "sd35-trt calibrate"):
            calibration().check(files, LAYERS, [ATTENTION])


def test_another_policy() -> None:
    with refused("no scale for denoiser/proj_out", "--policy"):
        calibration().check(FILES, [*LAYERS, "denoiser/proj_out"], [ATTENTION])
    with refused("has a scale for denoiser/blocks.0.ff.net.2", "--policy"):
        calibration().check(FILES, LAYERS[:1], [ATTENTION])
    with refused("no scale for denoiser/blocks.0.attn.q, .* and 1 more"):
        calibration(bmm={}).check(FILES, LAYERS, [ATTENTION])
    with refused("has a scale for denoiser/blocks.0.attn.k"):
        calibration().check(FILES, LAYERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e-40])
def test_scales_without_use(value: float) -> None:
    with refused(r"blocks\.0\.attn\.to_q"):
        calibration(inputs={LAYERS[0]: value, LAYERS[1]: 1.0}).check(FILES, LAYERS, [ATTENTION])
    with refused(r"blocks\.0\.attn\.q"):
        calibration(bmm={f"{ATTENTION}.{x}": value for x in "qkvp"}).check(
            FILES, LAYERS, [ATTENTION]
        )


def test_activations_that_are_not_finite() -> None:
    for value in (float("nan"), float("inf")):
        with refused("activations not finite", "denoiser/x"):
            calibration(activations={"denoiser/x": value}).check(FILES, LAYERS, [ATTENTION])
