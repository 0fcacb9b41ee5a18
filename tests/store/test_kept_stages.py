"""A finished stage is kept and used, whatever cannot be read, or written beside it."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import NAMELESS, python_in, python_on

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.progress import silent
from sd35_trt.store import hashes, lock
from sd35_trt.store.cache import StageCache, cache_dir, default_cache_dir, open_cache
from sd35_trt.store.stages import Stage, run_stage

# Takes a stage from a cache or makes it, and prints its folder, or the error.
SCRIPT = """
import os, shutil, sys, tempfile
from pathlib import Path
from sd35_trt.errors import Sd35Error
from sd35_trt.store.cache import StageCache
from sd35_trt.store.disk import file_errors
from sd35_trt.store.stages import Stage, run_stage

def run(out, progress):
    (out / "model").write_bytes(bytes(int(sys.argv[2])))
    with tempfile.TemporaryFile() as file:
        file.write(bytes(int(sys.argv[3])))

try:
    stage = Stage("t5", {"of": sys.argv[4]}, (), run)
    folder = run_stage(StageCache(Path(sys.argv[1])), stage, lambda *_: None)
    if len(sys.argv) > 5:
        with file_errors(Path(sys.argv[5]), "choose another --out"):
            shutil.copyfile(folder / "model", sys.argv[5])
    print(folder)
except Sd35Error as error:
    print("error:", error)
"""


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that any user reaches, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def run(out: Path, progress: object) -> None:
    (out / "model").write_bytes(bytes(10))


def finished(cache: Path, of: str = "a") -> Path:
    return run_stage(StageCache(cache), Stage("t5", {"of": of}, (), run), silent)


def made_anew(cache: Path) -> bool:
    """Whether a build does not take the stage that is there."""
    runs: list[Path] = []

    def note(out: Path, progress: object) -> None:
        runs.append(out)
        run(out, progress)

    run_stage(StageCache(cache), Stage("t5", {"of": "a"}, (), note), silent)
    return bool(runs)


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, as it is."""
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in sorted(root.rglob("*"))}


def result(command: list[str], *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


@pytest.mark.parametrize("hashed", [True, False])
def test_a_read_only_disk(hashed: bool, root: Path) -> None:
    cache = root / "cache"
    folder = finished(cache)
    if not hashed:
        for note in (cache / "hashes").iterdir():
            note.unlink()
    before = files(cache)
    command = python_on({cache: "ro"}, "-c", SCRIPT, cache, 10, 0)
    assert result(command, "a") == str(folder)
    line = result(command, "b")
    assert line == (
        f"error: nothing can be written to the cache {cache}: Read-only file system — make it "
        "writable, or choose another --cache-dir"
    )
    assert files(cache) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
def test_another_users_cache(root: Path) -> None:
    cache = root / "cache"
    folder = finished(cache)
    for path in (cache, *cache.rglob("*")):
        os.chown(path, 65534, 65534)
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = files(cache)
    command = python_in(NAMELESS, "-c", SCRIPT, cache, 10, 0)
    assert result(command, "a") == str(folder)
    assert result(command, "b").startswith(
        f"error: nothing can be written to the cache {cache}: Permission denied — make it writable"
    )
    assert files(cache) == before


@pytest.mark.parametrize("kind", ["file", "closed", "link"])
def test_notes_that_cannot_be_written(kind: str, root: Path) -> None:
    cache = root / "cache"
    folder = finished(cache)
    for note in (cache / "hashes").iterdir():
        note.unlink()
    (cache / "hashes").rmdir()
    if kind == "file":
        (cache / "hashes").write_bytes(b"mine")
    elif kind == "closed":
        (cache / "hashes").mkdir(0o555)
    else:
        (cache / "hashes").symlink_to(root / "nowhere")
    command = python_in(NAMELESS, "-c", SCRIPT, cache, 10, 0)
    assert result(command, "a") == str(folder)
    assert Path(result(command, "b")).is_dir(), "others are made"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.ESTALE])
def test_a_stage_that_cannot_be_read_stays(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: only another hash says that it is not."""
    folder = finished(root / "cache")
    for note in (root / "cache" / "hashes").iterdir():
        note.unlink()

    def fail(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "sha256_file", fail)
        with pytest.raises(Sd35Error, match=f"{folder}/model, in the cache: {os.strerror(number)}"):
            made_anew(root / "cache")
    assert not made_anew(root / "cache")


@pytest.mark.parametrize("name", ["stage.json", "model"])
def test_a_file_of_another_user(name: str, root: Path) -> None:
    folder = finished(root / "cache")
    for note in (root / "cache" / "hashes").iterdir():
        note.unlink()
    mode = (folder / name).stat().st_mode
    (folder / name).chmod(0)
    command = python_in(NAMELESS, "-c", SCRIPT, root / "cache", 10, 0)
    line = result(command, "a")
    assert line.startswith(f"error: cannot use {folder / name}, in the cache: Permission denied — ")
    (folder / name).chmod(mode)
    assert not made_anew(root / "cache")


def test_what_is_damaged_is_made_anew(root: Path) -> None:
    def remove(folder: Path) -> None:
        (folder / "model").unlink()

    def record(folder: Path) -> None:
        (folder / "stage.json").write_text("{")

    def folder_in_place(folder: Path) -> None:
        (folder / "stage.json").unlink()
        (folder / "stage.json").mkdir()

    def content(folder: Path) -> None:
        (folder / "model").chmod(0o644)
        (folder / "model").write_bytes(b"0123456789")

    for damage in (remove, record, folder_in_place, content):
        damage(finished(root / "cache"))
        assert made_anew(root / "cache"), damage
        assert not made_anew(root / "cache"), damage


@pytest.mark.parametrize("place", ["cache", "temporary", "out"])
def test_the_disk_that_is_full_is_named(place: str, root: Path) -> None:
    """And what is finished stays."""
    disks = {name: root / name for name in ("cache", "temporary", "out")}
    for disk in disks.values():
        disk.mkdir()
    sizes = {disk: "1m" if name == place else "64m" for name, disk in disks.items()}
    # It is made on the disk that is full then.
    script = f"""
import subprocess, sys
words = [sys.executable, "-c", sys.argv[1], {str(disks["cache"])!r}]
out = {str(disks["out"] / "file")!r}
first = subprocess.run([*words, "1000", "0", "a"], check=True, capture_output=True, text=True)
print(first.stdout.strip())
sizes = ["2000000" if {place!r} != "temporary" else "10", "2000000"]
print(subprocess.run([*words, *sizes, "b", out], capture_output=True, text=True).stdout.strip())
print(subprocess.run([*words, "1000", "0", "a"], capture_output=True, text=True).stdout.strip())
"""
    done = subprocess.run(
        python_on(sizes, "-c", script, SCRIPT),
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(disks["temporary"])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, error, again = done.stdout.splitlines()
    assert first == again
    expected = {
        "cache": (", in the cache: ", "free space with sd35-trt cache prune, or choose another -"),
        "temporary": (", in the folder for temporary files: ", "free space, or point TMPDIR to an"),
        "out": ("/file: ", "free space, or choose another --out"),
    }
    title, way = expected[place]
    assert error.startswith(f"error: cannot write {disks[place]}"), error
    assert f"{title}No space left on device (0.0 GB free there) — {way}" in error


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run under any user's id."""
    code = "from sd35_trt.cli import main; main()"
    for words, fix in (
        (["cache"], "set SD35_TRT_CACHE, or name a folder with --cache-dir"),
        (["cache", "prune"], "set SD35_TRT_CACHE, or name a folder with --cache-dir"),
        (["build", "--gpu", "cpu"], "set SD35_TRT_CACHE, or name a folder with --cache-dir"),
        (["calibrate", "--out", "made"], "set SD35_TRT_CACHE to a folder for it"),
    ):
        done = subprocess.run(
            python_in(NAMELESS, "-c", code, *words), capture_output=True, text=True, env={}, cwd="/"
        )
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr == f"error: there is no home directory to keep the cache in — {fix}\n"
    done = subprocess.run(
        python_in(NAMELESS, "-c", code, "doctor"), capture_output=True, text=True, env={}, cwd="/"
    )
    assert "cache in no folder — set SD35_TRT_CACHE" in " ".join(done.stdout.split())
    assert done.returncode == 0


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SD35_TRT_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "sd35-trt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/sd35-trt")
    monkeypatch.setenv("SD35_TRT_CACHE", "/y")
    assert default_cache_dir() == Path("/y")
    assert cache_dir(Path("z")) == Path("z")


def test_a_cache_that_cannot_be_made_is_refused_before_work(root: Path) -> None:
    (root / "file").write_bytes(b"")
    for path in (root / "file", root / "file" / "below", Path("/proc/cache")):
        with pytest.raises(
            UsageError, match=rf"the cache {path} cannot be used: .* SD35_TRT_CACHE"
        ):
            open_cache(path)
    open_cache(root / "new" / "cache")
    assert not (root / "new").exists(), "it is made when something is kept"
    home = root / "home"
    home.mkdir(0o555)
    code = "import sys; from sd35_trt.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        python_in(NAMELESS, "-c", code, "build", "--out", root / "bundle"),
        capture_output=True, text=True, env={"HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"error: the cache {home}/.cache/sd35-trt cannot be used: Permission denied — set "
        "SD35_TRT_CACHE to another folder, or choose another --cache-dir\n"
    )


def test_what_a_killed_process_left_goes_when_the_cache_is_opened(root: Path) -> None:
    """Of whatever kind."""
    work = root / "vae" / ".tmp-work-0123456789ab"
    work.mkdir(parents=True)
    work.with_name(f"{work.name}.lock").touch()
    with StageCache(root).create("t5", "0" * 64) as running:
        open_cache(root)
        assert running.is_dir()
    assert not list((root / "vae").iterdir())


def test_a_copy_for_another_process(root: Path) -> None:
    """It has the folder, and no lock of this one's."""
    cache, folder = StageCache(root), finished(root)
    assert cache.find("t5", folder.name) == folder
    assert copy.copy(cache).root == root
    with lock.unheld(folder / "stage.json") as unused:
        assert not unused
    del cache
    with lock.unheld(folder / "stage.json") as unused:
        assert unused
