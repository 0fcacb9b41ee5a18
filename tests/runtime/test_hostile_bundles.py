"""Bundles that nobody should draw from: refused in one line, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attacks.altered import altered
from attacks.drawing import ATTACKS, Attack
from bare_bundle import read_json, sign

from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.bundle import SMALL_FILE, Bundle, File, _linked
from sd35_trt.runtime import Pipeline

TESTS = Path(__file__).parents[1]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_it_is_refused_before_anything_loads(bundle: Path, attack: Attack) -> None:
    assert attack.__doc__
    data = read_json(bundle)
    attack(data)
    sign(bundle, json.dumps(data))
    with pytest.raises(BundleError, match=ATTACKS[attack]) as caught:
        Pipeline.load(bundle)
    message = str(caught.value)
    assert "\n" not in message
    assert str(bundle) in message
    assert " — " in message


def test_any_field_may_be_anything(bundle: Path) -> None:
    """Signed again, a bundle is drawn from or refused in one line."""
    original = read_json(bundle)
    drawn, refusals = 0, []
    for data in altered(original):
        sign(bundle, json.dumps(data))
        try:
            with Pipeline.load(bundle, threads=1) as pipe:
                pipe.generate("a star", steps=1)
            drawn += 1
        except Sd35Error as error:
            refusals.append(str(error))
    assert drawn > 50, "commands, dates and the like say nothing"
    assert len(refusals) > 1000
    assert not [text for text in refusals if "\n" in text or "report this" in text]


_EVERY = """
import json, os, resource, shutil, sys
from pathlib import Path
from attacks import bundles, drawing
from bare_bundle import read_json, sign, write_bundle
from sd35_trt.errors import BundleError
from sd35_trt.runtime import Pipeline
tiny, folder = map(Path, sys.argv[1:])
def refused(root):
    try:
        Pipeline.load(root)
    except BundleError:
        return
    raise SystemExit(f"{root} is not refused")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def read():
    return int(Path("/proc/self/io").read_text().split()[1])
(folder / "empty").mkdir()
refused(folder / "empty")
before = peak()
most = (0, "")
for attack in bundles.ATTACKS:
    root = folder / attack.__name__ / "bundle"
    write_bundle(root)
    attack(root)
    start = read()
    refused(root)
    most = max(most, (read() - start, attack.__name__))
for attack in drawing.ATTACKS:
    root = folder / attack.__name__
    shutil.copytree(tiny, root)
    data = read_json(root)
    attack(data)
    sign(root, json.dumps(data))
    start = read()
    refused(root)
    most = max(most, (read() - start, attack.__name__))
print(peak() - before, *most)
"""


def test_what_refusing_takes(tiny_bundle: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _EVERY, str(tiny_bundle), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    megabytes, read_bytes, name = ended.stdout.split()
    assert int(megabytes) <= 200
    assert int(read_bytes) <= 64 << 20, f"{name} is read without end"


# The hub's cache.


def to_hub_layout(bundle: Path) -> Path:
    """Move a bundle's files into ``blobs``, as the hub's cache has them; the new root."""
    root, blobs = bundle.parent / "snapshots" / "1234", bundle.parent / "blobs"
    blobs.mkdir()
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        link = root / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha1(path.read_bytes()).hexdigest()
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root


def test_a_bundle_in_the_hubs_cache_is_drawn_from(tiny_bundle: Path, bundle: Path) -> None:
    root = to_hub_layout(bundle)
    with Pipeline.load(root, verify=True) as pipe, Pipeline.load(tiny_bundle) as other:
        mine, its = (one.generate("a star", steps=2).latents for one in (pipe, other))
        assert (mine == its).all()


def test_a_link_to_other_content_leaves_the_bundle(bundle: Path) -> None:
    root = to_hub_layout(bundle)
    weights = (root / Bundle.open(root).manifest.component("denoiser").files[1].path).resolve()  # type: ignore[union-attr]
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="leaves the bundle — do not use"):
        Pipeline.load(root)


def test_a_large_file_is_known_by_the_name_that_the_hub_gave_it(tmp_path: Path) -> None:
    """Sixteen gigabytes are not hashed at every load."""
    digest = "ab" * 32
    size = SMALL_FILE + 1
    (tmp_path / "bundle").mkdir()
    for name in (digest, "other"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
        link = tmp_path / "bundle" / f"link-{name}"
        link.symlink_to(tmp_path / name)
    root = tmp_path / "bundle"
    assert _linked(root, File(f"link-{digest}", size, digest)) == tmp_path / digest
    assert _linked(root, File(f"link-{digest}", size - 1, digest)) is None
    assert _linked(root, File("link-other", size, digest)) is None
