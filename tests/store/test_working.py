"""Working directories: alive by their lock, in any container; cleared when their process died."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from namespaces import PROCESSES, python_in

from sd35_trt.store import lock
from sd35_trt.store.replacement import replacement
from sd35_trt.store.working import remove_work, working_directories, working_directory

PREFIX = ".tmp-"

# Writes in a working directory until its input ends.
HOLD = """
import os, sys
from pathlib import Path
{before}
from sd35_trt.store.working import working_directory
with working_directory(Path(sys.argv[1]), ".tmp-") as work:
    (work / "half").write_text("written")
    print(work, flush=True)
    sys.stdin.read()
    print((work / "half").read_text(), flush=True)
"""

# An id that no process has.
NO_PROCESS = "os.getpid = lambda: 4194305"


def command(kind: str, parent: Path) -> list[str]:
    """The command that holds a directory, here or in a container."""
    script = HOLD.format(before=NO_PROCESS if kind == "another id" else "")
    if kind == "container":
        return python_in(PROCESSES, "-c", script, parent)
    return [sys.executable, "-c", script, str(parent)]


@contextmanager
def held(kind: str, parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    words = command(kind, parent)
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("first", ["here", "container", "another id"])
@pytest.mark.parametrize("second", ["here", "container"])
def test_running_work_stays(first: str, second: str, tmp_path: Path) -> None:
    """Whatever ids the processes see each other under."""
    with held(first, tmp_path) as (process, work), held(second, tmp_path) as (_, other):
        assert work != other
        assert (work / "half").is_file(), "deleted while it was written in"
        output, _ = process.communicate(timeout=60)
        assert output == "written\n"
        assert not work.exists()
    assert not list(tmp_path.iterdir())


def wait_for_lock(path: Path) -> None:
    """A container's processes end a moment after what started them."""
    for _ in range(600):
        with lock.unheld(path) as free:
            if free:
                return
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["here", "container"])
def test_work_of_a_killed_process_goes(kind: str, tmp_path: Path) -> None:
    with held(kind, tmp_path) as (process, work):
        process.kill()
        process.wait(60)
    assert (work / "half").is_file()
    wait_for_lock(work.with_name(f"{work.name}.lock"))
    with working_directory(tmp_path, PREFIX) as own:
        assert {path.name for path in tmp_path.iterdir()} == {own.name, f"{own.name}.lock"}
    assert not list(tmp_path.iterdir())


def test_many_at_once(tmp_path: Path) -> None:
    """Those that begin clear, and take nothing from each other."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(40):
                with working_directory(tmp_path, PREFIX) as path:
                    (path / "file").write_text("x")
                    (path / "file").rename(path / "renamed")
                    if number % 2:
                        path.rename(tmp_path / f"done-{path.name}")
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
    results = list(tmp_path.iterdir())
    assert len(results) == 80
    assert all([p.name for p in path.iterdir()] == ["renamed"] for path in results)


def left(parent: Path, name: str, age: float = 0.0) -> Path:
    """A directory that looks like another version's, last changed so many seconds ago."""
    path = parent / name
    path.mkdir()
    (path / "half").write_bytes(b"")
    for each in (path / "half", path):
        os.utime(each, (time.time() - age,) * 2)
    return path


def test_without_locks_nothing_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = left(tmp_path, f"{PREFIX}work-0123456789ab", 1e6)
    work.with_name(f"{work.name}.lock").touch()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(lock.fcntl, "flock", refuse)
        with working_directory(tmp_path, PREFIX) as own:
            assert own.is_dir()
            assert not remove_work(own)
        assert not remove_work(work)
    assert work.is_dir()
    with working_directory(tmp_path, PREFIX):
        assert not work.exists()


def test_what_has_no_lock_is_left_behind_after_a_day(tmp_path: Path) -> None:
    """Earlier versions named theirs by their process, and made no lock."""
    old, new = left(tmp_path, f"{PREFIX}1-abcdefgh", 90_000), left(tmp_path, f"{PREFIX}2-abcdefgh")
    busy = left(tmp_path, f"{PREFIX}3-abcdefgh", 90_000)
    os.utime(busy / "half")
    foreign = left(tmp_path, f"{PREFIX}mine", 90_000)
    link = tmp_path / f"{PREFIX}4-abcdefgh"
    link.symlink_to(foreign)
    with working_directory(tmp_path, PREFIX):
        assert old.is_dir()
    assert working_directories(tmp_path, PREFIX) == [old, new, busy]
    assert remove_work(old, dry=True)
    assert old.is_dir()
    assert [remove_work(path) for path in (old, new, busy)] == [True, False, False]
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (new, busy, foreign, link)
    }


@pytest.mark.parametrize("name", ["bundle", "b[v2]"])
def test_a_directory_beside_its_name(name: str, tmp_path: Path) -> None:
    """A bundle: no lock ends in it or stays beside it, and what a dead process left goes."""
    out = tmp_path / name
    dead = left(tmp_path, f".{name}.building-work-0123456789ab")
    dead.with_name(f"{dead.name}.lock").touch()
    for text in ("one", "two"):
        with replacement(out, "marker") as work:
            assert not dead.exists()
            (work / "marker").write_text(text)
        assert {path.name for path in tmp_path.iterdir()} == {name}
        assert {path.name for path in out.iterdir()} == {"marker"}
        assert (out / "marker").read_text() == text


def test_a_failed_replacement_keeps_the_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file system cannot swap two directories."""
    monkeypatch.setattr("sd35_trt.store.replacement._exchange", lambda one, other: False)
    out = tmp_path / "bundle"
    with replacement(out, "marker") as work:
        (work / "marker").write_text("one")
    with pytest.raises(FileNotFoundError), replacement(out, "marker") as work:
        work.rename(tmp_path / "elsewhere")
    assert (out / "marker").read_text() == "one"
