"""Opening a bundle: damage, foreign formats and escapes are refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacks.bundles import ATTACKS, Attack
from bare_bundle import read_json, sign, to_format_1, write_bundle
from msgspec.structs import replace

from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.bundle import (
    FORMAT,
    MANIFEST,
    MANIFEST_DIGEST,
    Bundle,
    describe_file,
    write_manifest,
)
from sd35_trt.runtime import Pipeline


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """To damage."""
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def mini_copy(mini_bundle: Path, tmp_path: Path) -> Path:
    """To damage, with engines."""
    return Path(shutil.copytree(mini_bundle, tmp_path / "mini"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and sign it again, as a foreign tool would."""
    data = read_json(bundle)
    change(data)
    sign(bundle, json.dumps(data))


def flip_bit(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.chmod(0o644)
    path.write_bytes(data)


def refused(bundle: Path, *words: str, verify: bool = False) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert " — " in message, "every refusal names what to do"
    for word in words:
        assert word in message


def test_opens(mini_bundle: Path) -> None:
    opened = Bundle.open(mini_bundle, verify=True)
    assert {c.name for c in opened.manifest.components} == {
        "clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder", "vae_encoder",
    }  # fmt: skip
    on_disk = {str(p.relative_to(mini_bundle)) for p in mini_bundle.rglob("*") if p.is_file()}
    listed = {f.path for f in opened.manifest.all_files()}
    assert listed == on_disk - {MANIFEST, MANIFEST_DIGEST}


def test_a_manifest_survives_writing_and_reading(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, manifest)
    assert Bundle.open(bundle).manifest == manifest


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attacks(bundle: Path, attack: Attack) -> None:
    assert attack.__doc__
    attack(bundle)
    with pytest.raises(BundleError, match=ATTACKS[attack]) as caught:
        Bundle.open(bundle)
    message = str(caught.value)
    assert "\n" not in message
    assert str(bundle) in message
    assert " — " in message, "every refusal names what to do"
    assert len(message) < 3000


def test_format_1_is_read(bundle: Path) -> None:
    """As the first versions wrote it; written again, it is of the newest format."""
    manifest = Bundle.open(bundle).manifest
    to_format_1(bundle)
    old = Bundle.open(bundle, verify=True).manifest
    assert old == replace(manifest, format=1)
    write_manifest(bundle, old)
    assert Bundle.open(bundle).manifest == manifest


def test_format_1_is_refused_where_its_digest_differs(bundle: Path) -> None:
    to_format_1(bundle)
    data = read_json(bundle)
    (bundle / MANIFEST).write_text(json.dumps({**data, "guided": False}))
    refused(bundle, "its digest differs")


def test_the_digest_is_of_bytes(bundle: Path) -> None:
    """Other white space is another manifest, and as good once it is signed."""
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text + " ")
    refused(bundle, "its digest differs")
    sign(bundle, json.dumps(json.loads(text), indent=7))
    Bundle.open(bundle)
    (bundle / MANIFEST_DIGEST).write_text((bundle / MANIFEST_DIGEST).read_text() * 2)
    refused(bundle, "its digest differs")
    (bundle / MANIFEST_DIGEST).write_bytes(b"\xff" * 65)
    refused(bundle, MANIFEST_DIGEST, "cannot be read")


def test_what_is_required_and_not_known(bundle: Path) -> None:
    edit(bundle, lambda d: d.update(requires=["later"]))
    refused(bundle, "requires 'later'", "upgrade sd35-trt")


def test_unknown_fields_are_tolerated(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest

    def change(data: dict[str, Any]) -> None:
        data["later"] = {"a": [1, None, 1e30]}
        data["components"][0]["later"] = data["ranges"]["later"] = "new"

    edit(bundle, change)
    assert Bundle.open(bundle).manifest == manifest


def test_not_a_bundle(tmp_path: Path) -> None:
    refused(tmp_path, "is not a bundle", "sd35-trt build")
    refused(tmp_path / "nothing", "is not a bundle")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a bundle")


def test_missing_file(bundle: Path) -> None:
    (bundle / "denoiser" / "weights.data").unlink()
    refused(bundle, "denoiser/weights.data is missing", "sd35-trt build")


def test_flipped_bits_are_found_in_every_file(bundle: Path) -> None:
    rng = random.Random(0)
    files = [str(p.relative_to(bundle)) for p in sorted(bundle.rglob("*")) if p.is_file()]
    for file in files:
        path = bundle / file
        original = path.read_bytes()
        for _ in range(10):
            flip_bit(path, rng.randrange(len(original)), rng.randrange(8))
            with pytest.raises(Sd35Error):
                Bundle.open(bundle, verify=True)
            path.write_bytes(original)
    Bundle.open(bundle, verify=True)


def test_damaged_manifests_never_crash(bundle: Path) -> None:
    path = bundle / MANIFEST
    original = path.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        if data == original:
            continue
        path.write_bytes(data)
        with pytest.raises(BundleError):
            Bundle.open(bundle)


# What older bundles do not have.
_OPTIONAL = ("requires", "adapter_ranks", "controls", "short_steps")


def _drop_every_field(data: dict[str, Any]) -> list[Callable[[dict[str, Any]], None]]:
    return [lambda d, k=key: d.pop(k) for key in data if key not in _OPTIONAL]


def test_signed_but_incomplete_manifests(bundle: Path) -> None:
    path = bundle / MANIFEST
    original = path.read_text()
    for change in _drop_every_field(json.loads(original)):
        path.write_text(original)
        edit(bundle, change)
        refused(bundle, "lacks or misstates a field")


def test_newer_and_older_format(bundle: Path) -> None:
    edit(bundle, lambda d: d.update(format=FORMAT + 1))
    refused(bundle, f"format {FORMAT + 1}", "upgrade sd35-trt")
    edit(bundle, lambda d: d.update(format=0))
    refused(bundle, "format 0", "sd35-trt build")
    edit(bundle, lambda d: d.pop("format"))
    refused(bundle, "`format`")


def test_an_onnx_file_that_points_outside_is_refused(mini_copy: Path) -> None:
    import onnx

    secret = mini_copy.parent / "secret.data"
    shutil.copy(mini_copy / "denoiser" / "weights.data", secret)
    path = mini_copy / "denoiser" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret.data"
    path.chmod(0o644)
    onnx.save(model, path)

    def change(data: dict[str, Any]) -> None:
        component = next(c for c in data["components"] if c["name"] == "denoiser")
        described = describe_file(mini_copy, "denoiser/model.onnx")
        component["files"][0].update(bytes=described.bytes, sha256=described.sha256)

    edit(mini_copy, change)
    with Pipeline.load(mini_copy) as pipe, pytest.raises(Sd35Error, match="onnxruntime") as caught:
        pipe("a red star", steps=1)
    assert "\n" not in str(caught.value)


def test_an_engine_kind_that_this_version_does_not_have(mini_copy: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for component in data["components"]:
            component["engine"] = "openvino"

    edit(mini_copy, change)
    with pytest.raises(BundleError, match="runs no openvino engines, but onnxruntime"):
        Pipeline.load(mini_copy)


def test_unreadable_manifest(bundle: Path) -> None:
    if os.geteuid() == 0:
        (bundle / MANIFEST).unlink()
        (bundle / MANIFEST).mkdir()
    else:
        (bundle / MANIFEST).chmod(0)
    refused(bundle, "cannot be read")
