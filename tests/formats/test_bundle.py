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

from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.bundle import FORMAT, MANIFEST, Bundle, _digest
from sd35_trt.runtime import Pipeline


@pytest.fixture
def bundle(mini_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and sign it again, as a foreign tool would."""
    path = bundle / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    data["digest"] = _digest(data)
    path.write_text(json.dumps(data))


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


def test_opens(bundle: Path) -> None:
    opened = Bundle.open(bundle, verify=True)
    assert {c.name for c in opened.manifest.components} == {
        "clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder", "vae_encoder",
    }  # fmt: skip
    on_disk = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()}
    assert {f.path for f in opened.manifest.all_files()} == on_disk - {MANIFEST}


def test_a_manifest_survives_writing_and_reading(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    (bundle / MANIFEST).write_text(manifest.to_json())
    assert Bundle.open(bundle).manifest == manifest


def test_not_a_bundle(tmp_path: Path) -> None:
    refused(tmp_path, "is not a bundle", "sd35-trt build")
    refused(tmp_path / "nothing", "is not a bundle")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a bundle")


def test_missing_file(bundle: Path) -> None:
    (bundle / "denoiser" / "weights.data").unlink()
    refused(bundle, "denoiser/weights.data is missing", "sd35-trt build")


def test_wrong_size(bundle: Path) -> None:
    path = bundle / "t5" / "weights.data"
    path.chmod(0o644)
    with path.open("ab") as stream:
        stream.write(b"x")
    refused(bundle, "t5/weights.data has", "the manifest says")


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


def _drop_every_field(data: dict[str, Any]) -> list[Callable[[dict[str, Any]], None]]:
    return [lambda d, k=key: d.pop(k) for key in data if key not in ("digest", "format")]


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


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../outside", "link/passwd"])
def test_paths_that_leave_the_bundle(bundle: Path, path: str) -> None:
    (bundle.parent / "outside").write_text("secret")
    (bundle / "link").symlink_to("/etc")

    def change(data: dict[str, Any]) -> None:
        data["components"][0]["files"][0]["path"] = path

    edit(bundle, change)
    refused(bundle, "leaves the bundle")


def test_an_onnx_file_that_points_outside_is_refused(bundle: Path) -> None:
    import onnx

    secret = bundle.parent / "secret.data"
    shutil.copy(bundle / "denoiser" / "weights.data", secret)
    path = bundle / "denoiser" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret.data"
    path.chmod(0o644)
    onnx.save(model, path)

    def change(data: dict[str, Any]) -> None:
        from sd35_trt.formats.bundle import describe_file

        component = next(c for c in data["components"] if c["name"] == "denoiser")
        described = describe_file(bundle, "denoiser/model.onnx")
        component["files"][0].update(bytes=described.bytes, sha256=described.sha256)

    edit(bundle, change)
    with Pipeline.load(bundle) as pipe, pytest.raises(Sd35Error, match="onnxruntime") as caught:
        pipe("a red star", steps=1)
    assert "\n" not in str(caught.value)


def test_an_engine_kind_that_this_version_does_not_have(bundle: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for component in data["components"]:
            component["engine"] = "openvino"

    edit(bundle, change)
    with pytest.raises(BundleError, match="runs no openvino engines, but onnxruntime"):
        Pipeline.load(bundle)


def test_unreadable_manifest(bundle: Path) -> None:
    if os.geteuid() == 0:
        (bundle / MANIFEST).unlink()
        (bundle / MANIFEST).mkdir()
    else:
        (bundle / MANIFEST).chmod(0)
    refused(bundle, "cannot be read")
