"""``sd35-trt cache`` as a user sees it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import one_error_line
from namespaces import NAMELESS, python_in

from sd35_trt.progress import silent
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage

DAY = 86400


def stage(root: Path, kind: str, of: str, days: float) -> Path:
    """A finished stage of a megabyte that was last used so many days ago."""

    def run(out: Path, progress: object) -> None:
        (out / "model").write_bytes(bytes(1_000_000))

    folder = run_stage(StageCache(root), Stage(kind, {"of": of}, (), run), silent)
    os.utime(folder, (time.time() - days * DAY,) * 2)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three stages, kernels, notes of hashes, and work that a killed process left."""
    root = tmp_path / "the [cache]"
    stage(root, "clip_l", "a", 40)
    stage(root, "clip_l", "b", 3)
    stage(root, "t5", "a", 50)
    (root / "kernels").mkdir()
    (root / "kernels" / "0.bin").write_bytes(bytes(500_000))
    work = root / "t5" / ".tmp-work-0123456789ab"
    work.mkdir()
    (work / "half").write_bytes(bytes(200_000))
    work.with_name(f"{work.name}.lock").touch()
    return root


def table(out: str) -> dict[str, list[str]]:
    """Cells of the list by the first."""
    rows = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()
    ]
    return {row[0]: row[1:] for row in rows if row}


def test_the_list(run, cache: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("cache", "--cache-dir", cache)
    assert status == 0
    rows = table(out)
    assert rows["kind"] == ["count", "bytes", "last used"]
    assert rows["clip_l"] == ["2", "2.0 MB", "3 days ago"]
    assert rows["t5"] == ["1", "1.0 MB", "50 days ago"]
    assert rows["compiled kernels"] == ["1", "500.0 kB", "now"]
    assert rows["being made, or left behind"] == ["1", "200.0 kB"]
    assert rows["notes of hashes"][0] == "3"
    assert out.splitlines()[-1] == f"{cache}: 3.7 MB"
    status, out, _ = run("cache", "--cache-dir", cache, "--json")
    data = json.loads(out)
    assert data["folder"] == str(cache)
    assert [(k["kind"], k["count"]) for k in data["kinds"]] == [
        ("clip_l", 2), ("t5", 1), ("kernels", 1)
    ]  # fmt: skip
    assert data["work"] == {"count": 1, "bytes": 200_000}
    assert data["bytes"] > 3_700_000
    assert data["kinds"][0]["last_used"].endswith("+00:00")


def test_the_folder(run, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """By the option, before the command or behind it, or by the variable."""
    assert run("cache", "--cache-dir", cache, "prune", "--dry-run")[1].count("would") == 2
    monkeypatch.setenv("SD35_TRT_CACHE", str(cache))
    assert run("cache")[1].endswith(f"{cache}: 3.7 MB\n")
    status, out, _ = run("cache", "--cache-dir", tmp_path / "none")
    assert (status, out) == (0, f"{tmp_path}/none: 0 B\n")
    assert run("cache", "prune", "--older", "0d", "--cache-dir", tmp_path / "none")[0] == 0
    assert not (tmp_path / "none").exists()
    status, _, err = run("cache", "--json", "prune")
    assert status == 2
    assert "--json stands behind the command" in one_error_line(err)


def test_prune(run, cache: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    old = next((cache / "t5").glob("[0-9a-f]*"))
    os.link(old / "model", tmp_path / "weights")
    status, dry, _ = run("cache", "prune", "--older", "30d", "--dry-run", "--cache-dir", cache)
    assert status == 0
    assert old.is_dir()
    status, out, _ = run("cache", "prune", "--older", "30d", "--cache-dir", cache)
    assert status == 0
    assert out.splitlines() == [
        "deleted 2 stages: 2.0 MB; that frees 1.0 MB, bundles have links to the rest",
        "deleted what 1 build left behind: 200.0 kB",
        "deleted 1 note of files that are gone or have changed",
        "the cache has 1.5 MB",
    ]
    assert dry == out.replace("deleted", "would delete").replace("has 1.5", "would have 1.5")
    assert not old.exists()
    status, out, _ = run("cache", "prune", "--max-size", "1MiB", "--json", "--cache-dir", cache)
    data = json.loads(out)
    assert [entry["kind"] for entry in data["deleted"]] == ["clip_l"]
    assert data["left_bytes"] < 2**20
    assert data["freed_bytes"] == data["bytes"]
    assert (cache / "kernels" / "0.bin").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--older", "30"), "is not a duration — say it in minutes, hours, days or weeks: 90m"),
        (("--max-size", "50"), "50 is less than 1 MiB — say it with a unit"),
        (("--max-size", "much"), "'much' is not a number of bytes such as 5.5GB"),
    ],
)
def test_wrong_use(words: tuple[str, str], message: str, run, cache: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run("cache", "prune", *words, "--cache-dir", cache)
    assert (status, out) == (2, "")
    assert message in one_error_line(err)


def test_a_file_is_no_cache(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_bytes(b"")
    for words in (["cache"], ["cache", "prune"]):
        status, _, err = run(*words, "--cache-dir", tmp_path / "file")
        assert status == 1
        assert "file, in the cache: Not a directory" in one_error_line(err)


def test_what_may_not_be_deleted(cache: Path) -> None:
    """The rest is deleted, and the line names who can."""
    old = next((cache / "t5").glob("[0-9a-f]*"))
    for path in (old, cache / "t5"):
        path.chmod(0o555)
    code = "import sys; from sd35_trt.cli import main; main(sys.argv[1:])"
    words = ["cache", "prune", "--older", "30d", "--cache-dir", cache]
    done = subprocess.run(python_in(NAMELESS, "-c", code, *words), capture_output=True, text=True)
    for path in (cache / "t5", old):
        path.chmod(0o755)
    assert done.returncode == 1
    assert one_error_line(done.stderr).startswith(f"error: cannot delete {cache}/t5: Permission")
    assert done.stdout.startswith("deleted 1 stage: 1.0 MB\n")
    assert old.is_dir()
