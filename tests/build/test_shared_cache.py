"""Builds from a finished cache: nothing is hashed again, and nothing needs to be written there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from namespaces import python_on

from sd35_trt.build import BuildOptions, build
from sd35_trt.formats.bundle import Bundle
from sd35_trt.quality.reference import open_reference
from sd35_trt.store.cache import StageCache

BUILD = (
    "import sys; from pathlib import Path; from sd35_trt.build import BuildOptions, build;"
    "build(BuildOptions(out=Path(sys.argv[1]), cache_dir=Path(sys.argv[2])))"
)


#: A bundle that is written anew from stages, and one whose files are links to theirs.
GRAPHS: dict[str, Any] = {}
PROGRAMS: dict[str, Any] = {"policy": "fp8", "target": "h200", "builder": "inductor"}


@pytest.fixture
def own_cache(
    make_bundle: Callable[..., Path], stage_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A cache with the stages of two builds, which no other test uses."""
    for options in (GRAPHS, PROGRAMS):
        make_bundle(**options)
    found: list[Path] = []
    find = StageCache.find

    def note(self: StageCache, kind: str, key: str) -> Path | None:
        folder = find(self, kind, key)
        found.extend([folder] if folder else [])
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(StageCache, "find", note)
        for options in (GRAPHS, PROGRAMS):
            build(BuildOptions(**options, out=tmp_path / "first", cache_dir=stage_cache))
    root = tmp_path / "cache"
    for folder in set(found):
        shutil.copytree(folder, root / folder.relative_to(stage_cache))
    shutil.rmtree(tmp_path / "first")
    return root


def links(bundle: Path) -> int:
    return sum(path.stat().st_nlink > 1 for path in bundle.rglob("*") if path.is_file())


def test_an_unchanged_build_hashes_nothing(
    own_cache: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    """Though a bundle's links to a stage's files change these, as far as the system tells."""
    out = tmp_path / "bundle"

    def again(options: dict[str, Any]) -> int:
        hashed.clear()
        build(BuildOptions(**options, out=out, cache_dir=own_cache))
        return len(hashed)

    assert again(GRAPHS) > 0
    assert again(PROGRAMS) > 0
    assert links(out) > 0
    # One takes the other's place, and the links there go.
    assert [again(options) for options in (PROGRAMS, GRAPHS, PROGRAMS)] == [0, 0, 0]
    shutil.rmtree(out)
    assert again(PROGRAMS) > 0, "what somebody else does to links is not ours"
    assert again(PROGRAMS) == 0


@pytest.mark.nightly
def test_a_comparison_hashes_nothing_again(
    make_bundle: Callable[..., Path], own_cache: Path, hashed: list[Path]
) -> None:
    """Though its reference goes, with its links to stages' files."""
    candidate = Bundle.open(make_bundle(**PROGRAMS))
    for _ in range(2):
        hashed.clear()
        with open_reference(candidate, "half", None, own_cache, lambda *_: None) as twin:
            assert twin.manifest.policy.name == "half"
            assert links(twin.root) > 0
    assert {path.name for path in hashed} == {"scheduler_config.json"}, "of its own work"


def test_a_finished_cache_on_a_read_only_disk(own_cache: Path, tmp_path: Path) -> None:
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in own_cache.rglob("*")}
    out = tmp_path / "bundle"
    command = python_on({own_cache: "ro"}, "-c", BUILD, out, own_cache)
    subprocess.run(command, check=True, cwd=tmp_path)
    assert Bundle.open(out, verify=True).manifest.model.name == "mini"
    assert {p: (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in own_cache.rglob("*")} == before


def test_the_next_build_clears_what_a_killed_one_left(own_cache: Path, tmp_path: Path) -> None:
    stage = own_cache / "clip_l"
    shutil.rmtree(stage)
    out = tmp_path / "bundle"
    script = BUILD.replace(
        "build(",
        "import os, signal; from sd35_trt.export import component\n"
        "component.export_component = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nbuild(",
        1,
    )
    words = python_on({}, "-c", script, out, own_cache)
    assert subprocess.run(words).returncode in (-9, 137)
    left = {path.name.rpartition("-")[0] for path in stage.iterdir()}
    assert left == {".tmp-work", ".lock"}
    build(BuildOptions(out=out, cache_dir=own_cache))
    (folder,) = stage.iterdir()
    assert len(folder.name) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "cache"]
