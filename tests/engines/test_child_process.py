"""Work in a child process: what it reports, how it fails, and that it ends when it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sd35_trt.engines.child_process import run_in_child
from sd35_trt.errors import Sd35Error, UsageError


class Strange(Exception):
    """One that cannot be made of its message alone."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def reports(folder: Path, report: Any) -> None:
    for k in range(3):
        report(k / 2, f"step {k}")
    (folder / "pid").write_text(str(os.getpid()))


def fails(error: BaseException, report: Any) -> None:
    raise error


def fails_strangely(job: None, report: Any) -> None:
    raise Strange(1, 2)


def crashes(job: None, report: Any) -> None:
    sys.stderr.write("out of luck\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(job: None, report: Any) -> None:
    os._exit(3)


def compiles_forever(folder: Path, report: Any) -> None:
    """As a compiler does: in a call that nothing but the end of its process interrupts."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "pid").write_text(str(os.getpid()))
    report(0.5, "compiling")
    while True:
        time.sleep(1000)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except FileNotFoundError:
        return False


def wait_for_the_end(pid: int) -> None:
    """Until a process is gone; a test that waits here for long has failed."""
    for _ in range(3000):
        if not is_alive(pid):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} goes on")


def test_it_reports_and_is_another_process(tmp_path: Path) -> None:
    notes: list[tuple[float, str]] = []
    run_in_child("working", reports, tmp_path, lambda *note: notes.append(note))
    assert notes == [(0.0, "step 0"), (0.5, "step 1"), (1.0, "step 2")]
    assert int((tmp_path / "pid").read_text()) != os.getpid()


@pytest.mark.parametrize(
    "error",
    [UsageError("it is wrong", "mend it"), OSError(28, "No space left on device", "plan")],
)
def test_an_error_is_raised_as_it_was(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_in_child("working", fails, error, lambda *_: None)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "fix", None) == getattr(error, "fix", None)
    assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)
    assert "in fails" in str(caught.value.__cause__), "the traceback of the child"


def test_an_error_that_cannot_be_handed_over() -> None:
    with pytest.raises(RuntimeError, match="Strange: 1 and 2"):
        run_in_child("working", fails_strangely, None, lambda *_: None)


def test_a_crash_is_one_line() -> None:
    with pytest.raises(Sd35Error) as caught:
        run_in_child("compiling denoiser", crashes, None, lambda *_: None)
    message = "compiling denoiser stopped: its process was ended by SIGSEGV (out of luck)"
    assert str(caught.value) == message
    with pytest.raises(Sd35Error, match=r"its process ended with status 3$"):
        run_in_child("compiling denoiser", exits, None, lambda *_: None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a shell's background job, as this may be, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_it(tmp_path: Path) -> None:
    """Ctrl-C reaches the caller while the child is in the middle of its work."""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(*_: Any) -> None:
        # When run_in_child waits again.
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        run_in_child("working", compiles_forever, tmp_path, interrupt)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_it_does_not_outlive_its_parent(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_child_process import compiles_forever
from sd35_trt.engines.child_process import run_in_child
run_in_child("working", compiles_forever, Path(sys.argv[1]), lambda *_: print("begun", flush=True))
"""
    folders = [str(Path(__file__).parents[k]) for k in (0, 1)]
    command = [sys.executable, "-c", code, str(tmp_path), *folders]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
    wait_for_the_end(int((tmp_path / "pid").read_text()))
