"""Pruning: what is not used goes, beside builds that run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from namespaces import PROCESSES, python_in

from sd35_trt.progress import silent
from sd35_trt.store import lock
from sd35_trt.store.cache import StageCache
from sd35_trt.store.contents import survey
from sd35_trt.store.pruning import Pruned, prune
from sd35_trt.store.stages import Stage, run_stage
from sd35_trt.store.working import working_directory

DAY = 86400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def stage(root: Path, kind: str, of: str, days: float = 0.0, size: int = 1000) -> Path:
    """A finished stage that was last used so many days ago."""

    def run(out: Path, progress: object) -> None:
        (out / "model").write_bytes(bytes(size))

    folder = run_stage(StageCache(root), Stage(kind, {"of": of}, (), run), silent)
    os.utime(folder, (time.time() - days * DAY,) * 2)
    return folder


def deleted(result: Pruned) -> list[Path]:
    return [entry.path for entry in result.entries]


def test_what_was_not_used_for_long_goes(root: Path) -> None:
    old, older, new = (
        stage(root, "t5", name, days) for name, days in zip("abc", (31, 60, 29), strict=True)
    )
    result = prune(root, older=30 * DAY, dry=True)
    assert deleted(result) == [older, old]
    assert old.is_dir()
    again = prune(root, older=30 * DAY)
    assert deleted(again) == [older, old]
    assert again.left == result.left == survey(root).bytes
    assert not older.exists()
    assert not old.exists()
    assert new.is_dir()
    # Only directories of stages are left, and nothing of what deleted them.
    assert list((root / "t5").iterdir()) == [new]


def test_taking_a_stage_is_its_use(root: Path) -> None:
    folder = stage(root, "t5", "a", 60)
    assert StageCache(root).find("t5", folder.name) == folder
    assert not prune(root, older=30 * DAY).entries
    assert folder.is_dir()


def test_the_longest_unused_go_until_the_rest_fits(root: Path) -> None:
    for number in range(10):
        stage(root, "t5" if number % 2 else "vae", str(number), number, 10_000)
    before = survey(root)
    result = prune(root, max_bytes=before.bytes - 25_000)
    oldest = sorted(before.entries, key=lambda entry: entry.used)
    assert deleted(result) == [entry.path for entry in oldest[:3]]
    assert survey(root).bytes == result.left <= before.bytes - 25_000


def test_without_options_nothing_finished_goes(root: Path) -> None:
    folder = stage(root, "t5", "a", 1000)
    assert not prune(root).entries
    assert folder.is_dir()


# Uses a stage of a cache until its input ends.
USE = """
import sys
from pathlib import Path
from sd35_trt.store.cache import StageCache
cache = StageCache(Path(sys.argv[1]))
folder = cache.find("t5", sys.argv[2])
print("found", flush=True)
sys.stdin.read()
print((folder / "model").stat().st_size, flush=True)
"""


@pytest.mark.parametrize("container", [False, True])
def test_what_a_build_uses_stays(container: bool, root: Path) -> None:
    folder = stage(root, "t5", "a")
    arguments = ["-c", USE, str(root), folder.name]
    words = python_in(PROCESSES, *arguments) if container else [sys.executable, *arguments]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "found\n"
        os.utime(folder, (0, 0))
        for dry in (True, False):
            result = prune(root, older=0, max_bytes=0, dry=dry)
            assert not result.entries
            assert [entry.path for entry in result.in_use] == [folder]
        assert process.communicate(timeout=60)[0] == "1000\n"
    assert deleted(prune(root, older=0)) == [folder]


def test_what_is_being_made_stays(root: Path) -> None:
    """The stage that is made anew in an old one's place, and its work."""
    folder, cache = stage(root, "t5", "a", 60), StageCache(root)
    with cache.lock("t5", folder.name, lambda: None), cache.create("t5", "0" * 64) as work:
        (work / "stage.json").write_text("{}")
        result = prune(root, older=DAY)
        assert [entry.path for entry in result.in_use] == [folder]
        assert not result.work
        assert work.is_dir()
    assert (root / "t5" / ("0" * 64)).is_dir()


def test_a_stage_that_goes_is_made_again(root: Path) -> None:
    """A build that waits for the lock meanwhile finds none."""
    folder = stage(root, "t5", "a", 60)
    prune(root, older=DAY)
    assert StageCache(root).find("t5", folder.name) is None
    assert stage(root, "t5", "a") == folder


def test_what_processes_left_behind_goes(root: Path) -> None:
    kept, killed = stage(root, "t5", "a", 1000), root / "t5" / ".tmp-work-0123456789ab"
    reference = root / "references" / ".tmp-4194305-abcdefgh"
    for path in (killed, reference):
        path.mkdir(parents=True)
        (path / "half").write_bytes(bytes(500))
    killed.with_name(f"{killed.name}.lock").touch()
    (root / "t5" / f".lock-{'0' * 64}").touch()
    os.utime(reference / "half", (0, 0))
    os.utime(reference, (0, 0))
    with working_directory(root / "vae", ".tmp-") as work:
        dry = prune(root, dry=True)
        assert killed.is_dir()
        result = prune(root)
        assert work.is_dir()
    assert dry.work == result.work == [reference, killed]
    assert dry.work_bytes == result.work_bytes == 1000
    assert dry.left == result.left
    assert list((root / "t5").iterdir()) == [kept]
    assert not list((root / "references").iterdir())


def test_notes_of_files_that_are_gone_go(root: Path, tmp_path: Path) -> None:
    folder, model = stage(root, "t5", "a"), tmp_path / "model"
    model.write_bytes(b"one")
    StageCache(root).file_hash(model)
    model.unlink()
    assert prune(root, dry=True).notes == 1
    assert prune(root).notes == 1
    assert len(list((root / "hashes").iterdir())) == 1, "the stage's own file"
    assert prune(root).notes == 0
    prune(root, older=0)
    assert not folder.exists()
    prune(root)
    assert not list((root / "hashes").iterdir())


def test_bytes_that_a_bundle_has_links_to_are_not_freed(root: Path, tmp_path: Path) -> None:
    folder = stage(root, "t5", "a", 60, 5000)
    os.link(folder / "model", tmp_path / "weights")
    result = prune(root, older=DAY)
    assert result.bytes >= 5000
    assert result.freed == result.bytes - 5000
    assert (tmp_path / "weights").stat().st_size == 5000


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "mine"
    mine = stage(outside, "t5", "a", 60)
    other = stage(root, "t5", "b", 60)
    (root / "vae").symlink_to(outside / "t5")
    (root / "t5" / mine.name).symlink_to(mine)
    (root / "t5" / ".tmp-1-abcdefgh").symlink_to(mine)
    (other / "inside").symlink_to(mine)
    before = sorted(outside.rglob("*"))
    assert deleted(prune(root, older=DAY, max_bytes=0)) == [other]
    assert sorted(outside.rglob("*")) == before


def test_what_is_not_the_caches_stays(root: Path) -> None:
    """Somebody may have named a folder of his own."""
    stage(root, "t5", "a", 60)
    mine = [root / "notes.txt", root / "t5" / "notes.txt", root / "kernels" / "notes.txt"]
    key = root / "photos" / ("a" * 64)
    for path in (*mine, key / "picture"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    prune(root, older=0, max_bytes=0)
    assert all(path.is_file() for path in (*mine, key / "picture"))


def test_kernels_and_timings_go_by_their_last_use(root: Path) -> None:
    for name, days in (("kernels/a.bin", 40), ("kernels/b.bin", 1), ("timings/a.timings", 50)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - days * DAY,) * 2)
    assert deleted(prune(root, older=30 * DAY)) == [
        root / "timings/a.timings",
        root / "kernels/a.bin",
    ]
    assert {p.name for p in root.glob("*/*")} == {"b.bin"}
    for name in ("kernels/b.bin.0123456789ab", "timings/a.timings.7", "timings/a.lock"):
        (root / name).touch()
        os.utime(root / name, (0, 0))
    (root / "kernels" / "c.bin.7").touch()  # just being written
    prune(root)
    assert {p.name for p in root.glob("*/*")} == {"b.bin", "c.bin.7"}


def test_without_locks_no_stage_is_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell whether one is used."""
    folder = stage(root, "t5", "a", 60)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    result = prune(root, older=DAY)
    assert not result.entries
    assert len(result.in_use) == 1
    assert folder.is_dir()


def test_no_cache_is_an_empty_one(root: Path) -> None:
    assert survey(root).bytes == prune(root, older=0).left == 0
    assert not root.exists()
