"""Stages: made once for all that need them, kept while they are whole."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sd35_trt.store import lock
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage, stage_files

#: Nothing that a test waits for takes longer, unless it never comes.
PATIENCE = 300.0

CODE = ("sd35_trt.store.cache",)

Report = Callable[[float, str], None]


@pytest.fixture
def cache(tmp_path: Path) -> StageCache:
    return StageCache(tmp_path / "cache")


class Work:
    """Counts how often it is done, and notes what is reported."""

    def __init__(self, text: str = "made") -> None:
        self.text = text
        self.count = 0
        self.notes: list[str] = []

    def __call__(self, out: Path, progress: Report) -> None:
        self.count += 1
        progress(0.5, "working")
        (out / "file").write_text(self.text)

    def run(self, cache: StageCache) -> Path:
        stage = Stage("small", {"text": self.text}, CODE, self)
        return run_stage(cache, stage, lambda name, done, total, note="": self.notes.append(note))


def test_a_stage_is_made_once(cache: StageCache) -> None:
    work = Work()
    folder = work.run(cache)
    assert work.run(cache) == folder
    assert work.count == 1
    assert work.notes == ["working", "done", "unchanged"]
    assert (folder / "file").read_text() == "made"
    assert stage_files(folder)["file"].bytes == 4
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing else stays"


@pytest.mark.parametrize("damage", [b"gone", b"longer than before", None])
def test_a_damaged_stage_is_made_again(cache: StageCache, damage: bytes | None) -> None:
    work = Work()
    file = work.run(cache) / "file"
    file.chmod(0o644)
    before = file.stat().st_mtime_ns
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
        os.utime(file, ns=(before + 1, before + 1))  # as any later write
    assert (work.run(cache) / "file").read_text() == "made"
    assert work.count == 2


def test_a_stage_that_fails_leaves_nothing(cache: StageCache) -> None:
    class Broken(Work):
        def __call__(self, out: Path, progress: Report) -> None:
            super().__call__(out, progress)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Broken().run(cache)
    assert not list((cache.root / "small").iterdir())
    assert Work().run(cache).is_dir()


def test_of_two_that_need_a_stage_one_waits(cache: StageCache) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Held(Work):
        def __call__(self, out: Path, progress: Report) -> None:
            begun.set()
            assert go_on.wait(PATIENCE)
            super().__call__(out, progress)

    first, second = Held(), Work()
    waits = threading.Event()

    def note(name: str, done: float, total: float, text: str = "") -> None:
        second.notes.append(text)
        if "waiting" in text:
            waits.set()

    folders: list[Path] = []
    stage = Stage("small", {"text": "made"}, CODE, second)
    threads = [
        threading.Thread(target=lambda: folders.append(first.run(cache))),
        threading.Thread(target=lambda: folders.append(run_stage(cache, stage, note))),
    ]
    threads[0].start()
    assert begun.wait(PATIENCE)
    threads[1].start()
    assert waits.wait(PATIENCE)
    # Another stage of the same kind is not held up.
    assert Work("other").run(cache).is_dir()
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert folders[0] == folders[1]
    assert (first.count, second.count) == (1, 0)
    assert list(dict.fromkeys(second.notes)) == ["waiting for another process", "done"]


def test_who_waits_takes_over_what_failed(cache: StageCache) -> None:
    begun, waits = threading.Event(), threading.Event()

    def fail(out: Path, progress: Report) -> None:
        begun.set()
        assert waits.wait(PATIENCE)
        raise RuntimeError("broken")

    failures: list[Exception] = []

    def first() -> None:
        try:
            run_stage(cache, Stage("small", {"text": "made"}, CODE, fail), lambda *_: None)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(PATIENCE)
    second = Work()
    stage = Stage("small", {"text": "made"}, CODE, second)
    folder = run_stage(cache, stage, lambda name, done, total, note="": waits.set())
    thread.join(PATIENCE)
    assert (len(failures), second.count) == (1, 1)
    assert (folder / "file").read_text() == "made"


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A lock whose holder was killed."""
    path = tmp_path / "lock"
    script = (
        "import sys; from pathlib import Path; from sd35_trt.store.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
    return path


def test_a_killed_process_holds_no_lock(killed: Path) -> None:
    assert killed.exists()
    waited: list[bool] = []
    with lock.exclusive(killed, lambda: waited.append(True)):
        assert not waited
    assert not killed.exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    """Also while the file goes and comes."""
    path, inside, most = tmp_path / "lock", [0], [0]

    def hold() -> None:
        for _ in range(50):
            with lock.exclusive(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert most == [1]
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    cache = StageCache(tmp_path)
    assert Work().run(cache).is_dir()


def test_a_lock_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), lock.exclusive(tmp_path / "nowhere/x"):
        pass
