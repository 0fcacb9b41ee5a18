"""Forks, and the end of a process: real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

#: In which nothing is drawn that is not said here to be drawn.
PATIENCE = 60.0

# Whether ONNX Runtime's telemetry runs; its thread is not in a child of a fork.
TELEMETRY = [{}, {"ORT_DISABLE_TELEMETRY": "1"}]


def run(
    code: str, *arguments: object, home: Path, telemetry: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the helpers of the tests."""
    ours = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(TESTS), "HOME": str(home), **(telemetry or TELEMETRY[1])}
    try:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it hangs: {error.stdout!r} {error.stderr!r}")


_FORK = """
import os, sys
from sd35_trt.runtime import Pipeline, PipelinePool
root, kind, what = sys.argv[1:]
def load():
    if kind == "pool":
        return PipelinePool({"a": root}, threads=2)
    pipe = Pipeline.load(root, threads=2)
    if kind == "warm":
        pipe.generate("a star", steps=1)
    return pipe
loaded = load()
if (pid := os.fork()) == 0:
    if what == "use":
        for call in (lambda: loaded.generate("a star", steps=1), lambda: loaded.generate("a")):
            try:
                call()
            except ValueError as error:
                print(error)
        loaded.close()
    if what == "load":
        loaded.close()
        with load() as own:
            print(own.generate("a star", steps=1).images.shape)
    print("the child's last words")
    sys.exit(7)
print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print("parent", loaded.generate("a star", steps=1).images.shape)
loaded.close()
"""


@pytest.mark.parametrize("telemetry", TELEMETRY, ids=["telemetry", "quiet"])
@pytest.mark.parametrize("what", ["nothing", "use", "load"])
@pytest.mark.parametrize("kind", ["cold", "warm", "pool"])
def test_a_child_of_a_fork(
    tiny_bundle: Path, tmp_path: Path, kind: str, what: str, telemetry: dict[str, str]
) -> None:
    if telemetry is TELEMETRY[0] and what != "nothing":
        pytest.skip("one case is enough for the end of the child")
    ended = run(_FORK, tiny_bundle, kind, what, home=tmp_path, telemetry=telemetry)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert "the child's last words" in lines
    assert "exit 7" in lines
    assert lines[-1].startswith("parent (1, ")
    said = [line for line in lines if "before this process was forked" in line]
    assert len(said) == (2 if what == "use" else 0)
    assert all("load it after the fork, in each child" in line for line in said)
    assert sum(line.startswith("(1, ") for line in lines) == (what == "load")


_QUEUE = """
import os, signal, sys, time
from pathlib import Path
from fake_engines import FakeEngines
from sd35_trt.runtime import PipelinePool
engines = FakeEngines()
engines.poison = lambda *_: time.sleep(0.2)
pool = PipelinePool({"a": engines.pipeline(Path(sys.argv[1]))})
futures = [pool.submit("a star", steps=5 + i) for i in range(60)]
time.sleep(0.5)
print(time.monotonic(), flush=True)
if sys.argv[2] == "interrupt":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
if sys.argv[2] == "raise":
    raise ValueError("the program's")
if sys.argv[2] == "wait":
    futures[-1].result(timeout=0.1)
if sys.argv[2] == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [("exit", 3), ("raise", 1), ("wait", 1), ("fall", 0), ("interrupt", -signal.SIGINT)],
)
def test_the_end_of_a_process_cancels_what_waits(
    tiny_bundle: Path, tmp_path: Path, how: str, status: int
) -> None:
    ended = run(_QUEUE, tiny_bundle, how, home=tmp_path)
    took = time.monotonic() - float(ended.stdout.split()[0])
    assert ended.returncode == status, ended.stderr
    assert took < 20, "all that waits would have taken 6 minutes"


_THREADS = """
import sys, threading, time
from pathlib import Path
from fake_engines import FakeEngines
engines = FakeEngines()
engines.poison = lambda *_: time.sleep(0.1)
pipe = engines.pipeline(Path(sys.argv[1]))
daemon = sys.argv[2] == "daemon"
def draw():
    print(pipe.generate("a star", steps=500 if daemon else 5).images.shape, flush=True)
threading.Thread(target=draw, daemon=daemon).start()
engines.wait_for_step()
print(time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("kind", ["daemon", "thread"])
def test_threads_that_draw_when_the_main_one_ends(
    tiny_bundle: Path, tmp_path: Path, kind: str
) -> None:
    """Python waits for a thread, and not for a daemon, which stops after its step."""
    ended = run(_THREADS, tiny_bundle, kind, home=tmp_path)
    took = time.monotonic() - float(ended.stdout.split()[0])
    assert ended.returncode == 0, ended.stderr
    assert ("(1, " in ended.stdout) == (kind == "thread")
    assert took < 20
