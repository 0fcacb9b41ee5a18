"""Bundles that libsd35 opens, and hostile ones that it refuses as Python does."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import bundles, drawing
from attacks.altered import altered
from attacks.documents import DOCUMENTS
from bare_bundle import read_json, sign, to_format_1, write_bundle
from cpp_build import library
from sd35_ctypes import Failure, Library, Pipe

from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import MANIFEST, SMALL_FILE, Bundle


@pytest.fixture(scope="module")
def lib() -> Library:
    return library()


def refusal(lib: Library, root: Path, **options: Any) -> str:
    with pytest.raises(Failure) as refused:
        Pipe(lib, root, **options)
    assert refused.value.status == "bundle"
    message = str(refused.value)
    assert "\n" not in message
    return message


def meaning(message: str) -> str:
    """What a message says of a file, without the words of a library."""
    kinds = (
        "leaves the bundle", "is missing", "is no regular file", "its digest differs",
        "is damaged", "the manifest", "cannot be read", "lacks or misstates", "is not a bundle",
    )  # fmt: skip
    return next(kind for kind in kinds if kind in message)


#: Where the systems' functions differ, the refusal has other words.
_OTHERWISE = {
    "number_out_of_range": "cannot be read",
    "path_of_a_name_too_long": "leaves the bundle",
}


@pytest.mark.parametrize("attack", bundles.ATTACKS, ids=lambda attack: attack.__name__)
def test_attacks_are_refused_as_in_python(
    attack: bundles.Attack, lib: Library, tmp_path: Path
) -> None:
    root = tmp_path / "bundle"
    write_bundle(root)
    attack(root)
    with pytest.raises(BundleError) as expected:
        Bundle.open(root, verify=True)
    message = refusal(lib, root, verify=1)
    name = attack.__name__
    assert meaning(message) == _OTHERWISE.get(name, meaning(str(expected.value))), message
    place = re.search(r"`(\$[^`]*)`", str(expected.value))
    if place and name not in _OTHERWISE and "[...]" not in place[1]:
        assert (
            place[1].split("[")[0].split(".")[1:2]
            == message.split("$")[1].split("`")[0].split("[")[0].split(".")[1:2]
        ), message


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_hostile_documents(text: str, lib: Library, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    write_bundle(root)
    sign(root, text)
    message = refusal(lib, root)
    assert "cannot be read" in message or "lacks or misstates" in message


@pytest.mark.parametrize("attack", drawing.ATTACKS, ids=lambda attack: attack.__name__)
def test_what_cannot_be_drawn_from_is_refused_in_pythons_words(
    attack: drawing.Attack, lib: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    _change(root, attack)
    message = refusal(lib, root)
    assert re.search(drawing.ATTACKS[attack], message), message


def _copy(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


def _change(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = read_json(root)
    change(data)
    sign(root, json.dumps(data))


def _component(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in data["components"] if c["name"] == name)


def _port(data: dict[str, Any], component: str, port: str) -> dict[str, Any]:
    ports = [*_component(data, component)["inputs"], *_component(data, component)["outputs"]]
    return next(p for p in ports if p["name"] == port)


def test_any_field_may_be_anything(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    """Signed again, a bundle is drawn from or refused in one line."""
    root = _copy(tiny_bundle, tmp_path / "bundle")
    original = read_json(root)
    drawn, refusals = 0, []
    for data in altered(original):
        sign(root, json.dumps(data))
        try:
            with Pipe(lib, root, threads=1) as pipe:
                pipe.generate("a star", steps=1)
            drawn += 1
        except Failure as error:
            refusals.append(str(error))
    assert drawn > 50, "commands, dates and the like say nothing"
    assert len(refusals) > 1000
    assert not [text for text in refusals if "\n" in text or "report this" in text]


def test_an_engine_of_other_shapes_than_the_manifest_says(
    lib: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    """It fails in one line, and writes nothing elsewhere."""

    def wider(data: dict[str, Any]) -> None:
        for component, port in (("t5", "hidden"), ("conditioner", "prompt_embeds")):
            _port(data, component, port)["shape"][2] = 4096

    root = _copy(tiny_bundle, tmp_path / "bundle")
    _change(root, wider)
    with Pipe(lib, root, threads=1) as pipe, pytest.raises(Failure, match="t5 failed in ONNX"):
        pipe.generate("a", steps=1)


@pytest.mark.parametrize("feature", ["step-cache", "branches", "something later"])
def test_what_is_required_has_to_be_known(
    feature: str, lib: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    _change(root, lambda d: d.update(requires=["adapters", feature]))
    message = refusal(lib, root)
    assert message.endswith(
        f"requires '{feature}', which this version does not know — upgrade libsd35"
    )


def test_a_later_format_is_refused(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    _change(root, lambda d: d.update(format=3))
    assert "has format 3, this version reads 1 and 2 — upgrade libsd35" in refusal(lib, root)


def test_unknown_fields_are_tolerated(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")

    def later(data: dict[str, Any]) -> None:
        data["later"] = {"a": [1, 2.5, None]}
        data["components"][0]["later"] = True
        data["engine_options"]["later"] = "x"

    _change(root, later)
    with Pipe(lib, root, threads=1) as pipe:
        assert len(pipe.generate("a", steps=1).images) == 1


def test_format_1_is_read(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    _change(root, lambda d: d["model"].update(name='Ünïcode "\\\x7f\U0001f308 model'))
    to_format_1(root)
    with Pipe(lib, root, threads=1) as pipe, Pipe(lib, tiny_bundle, threads=1) as other:
        drawn, expected = (p.generate("a star", steps=2) for p in (pipe, other))
        np.testing.assert_array_equal(drawn.images, expected.images)
    text = (root / MANIFEST).read_text("utf-8")
    (root / MANIFEST).write_text(text.replace('"guided": true', '"guided": true '))
    with Pipe(lib, root):
        pass  # the digest is of the values
    (root / MANIFEST).write_text(text.replace('"shift": 3.0', '"shift": 3.5'))
    assert "its digest differs" in refusal(lib, root)


def test_large_files_are_hashed_on_request(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    size = SMALL_FILE + 1
    (root / "large").write_bytes(bytes(size))
    entry = {"path": "large", "bytes": size, "sha256": "0" * 64}
    _change(root, lambda d: d["files"].append(entry))
    with Pipe(lib, root):
        pass
    assert "is damaged (SHA-256 differs)" in refusal(lib, root, verify=1)


def test_a_file_that_is_no_tokenizer(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    data = read_json(root)
    path = data["tokenizers"]["t5"]["path"]
    data["files"] = [f for f in data["files"] if f["path"] != path]
    sign(root, json.dumps(data))
    for text in ("", "{}", "[" * 100_000, '{"model": {"type": "BPE"}}'):
        (root / path).write_text(text)
        assert "t5.json is no tokenizer: " in refusal(lib, root)


def test_a_bundle_in_the_hubs_cache_is_drawn_from(
    lib: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Whose files are links to others of the content that the manifest states."""
    root, blobs = tmp_path / "snapshots" / "1234", tmp_path / "blobs"
    blobs.mkdir()
    for path in [path for path in tiny_bundle.rglob("*") if path.is_file()]:
        link = root / path.relative_to(tiny_bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / str(len(list(blobs.iterdir())))
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    with Pipe(lib, root, threads=1, verify=1) as pipe, Pipe(lib, tiny_bundle, threads=1) as other:
        drawn, expected = (p.generate("a star", steps=2) for p in (pipe, other))
        np.testing.assert_array_equal(drawn.latents, expected.latents)
    weights = (root / "denoiser" / "weights.data").resolve()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "leaves the bundle — do not use" in refusal(lib, root)


def test_a_large_file_is_known_by_the_name_that_the_hub_gave_it(
    lib: Library, tiny_bundle: Path, tmp_path: Path
) -> None:
    root = _copy(tiny_bundle, tmp_path / "bundle")
    digest, size = "ab" * 32, SMALL_FILE + 1
    for name in (digest, "other"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
    data = read_json(root)
    (root / "large").symlink_to(tmp_path / digest)
    data["files"].append({"path": "large", "bytes": size, "sha256": digest})
    sign(root, json.dumps(data))
    with Pipe(lib, root):
        pass
    (root / "large").unlink()
    (root / "large").symlink_to(tmp_path / "other")
    assert "leaves the bundle" in refusal(lib, root)


def test_weights_elsewhere_are_refused(lib: Library, tiny_bundle: Path, tmp_path: Path) -> None:
    """A graph whose external data is a file outside: the manifest's hash is right."""
    import onnx

    from sd35_trt.formats.bundle import describe_file

    root = _copy(tiny_bundle, tmp_path / "bundle")
    secret = tmp_path / "secret"
    secret.write_bytes((root / "denoiser" / "weights.data").read_bytes())
    path = root / "denoiser" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    path.write_bytes(model.SerializeToString())
    file = describe_file(root, "denoiser/model.onnx")

    def replace(data: dict[str, Any]) -> None:
        _component(data, "denoiser")["files"][0].update(bytes=file.bytes, sha256=file.sha256)

    _change(root, replace)
    with Pipe(lib, root, threads=1) as pipe:
        with pytest.raises(Failure, match="cannot be loaded by ONNX Runtime") as refused:
            pipe.generate("a", steps=1)
        assert refused.value.status == "bundle"
