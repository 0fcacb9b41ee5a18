"""libsd35, built once for all tests of a run."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from control_nets import net_options, write_mini_nets
from sd35_ctypes import Library

ROOT = Path(__file__).parents[2]
_DATA = json.loads((ROOT / "cpp/tests/cases.json").read_text("utf-8"))

#: What both languages draw alike, and the bundles of it by their options.
CASES: list[dict[str, Any]] = _DATA["cases"]
BUNDLES: dict[str, dict[str, Any]] = _DATA["bundles"]


def bundle_options(name: str, folder: Path) -> dict[str, Any]:
    """Of a bundle of :data:`BUNDLES`, for ``BuildOptions``.

    Args:
        folder: where ControlNets of random values are written.
    """
    own = dict(BUNDLES[name])
    nets = own.pop("nets", None)
    return own if nets is None else {**own, **net_options(write_mini_nets(folder / "nets", nets))}


# Of cpp/build.sh.
_MISSING = 3


@functools.cache
def built(preset: str = "release") -> Path:
    """The build directory of a preset; skips the test where something is missing."""
    folder = ROOT / "build" / "cpp"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".lock-{preset}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait, and find it built
        run = subprocess.run(
            [ROOT / "cpp/build.sh", preset], capture_output=True, text=True, check=False
        )
    if run.returncode == _MISSING:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    if not (folder / preset / "sd35" / "libsd35-onnxruntime.so").exists():
        pytest.skip("libsd35 is built without ONNX Runtime, whose headers are not installed")
    return folder / preset


def onnxruntime_library() -> Path:
    """The library of Python's own package."""
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def environment() -> dict[str, str]:
    """With the same ONNX Runtime as Python's."""
    return {**os.environ, "SD35_ONNXRUNTIME": str(onnxruntime_library())}


def library() -> Library:
    """The shared library, on the same ONNX Runtime as Python's."""
    os.environ["SD35_ONNXRUNTIME"] = str(onnxruntime_library())
    return Library(built() / "libsd35.so")


def run_program(program: Path, *arguments: object, text: str = "") -> str:
    """What a program prints."""
    run = subprocess.run(
        [program, *map(str, arguments)], input=text, capture_output=True, text=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def probe(part: str, document: Any) -> Any:
    """What a part of libsd35 makes of a document; see cpp/tests/probe.cpp."""
    return json.loads(run_program(built() / "tests" / "probe", part, text=json.dumps(document)))


def run_command(*words: object, folder: Path = ROOT) -> None:
    """A command that has to succeed."""
    run = subprocess.run(
        list(map(str, words)), cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@functools.cache
def examples() -> Path:
    """The examples, built from an installed tree as any project would."""
    tree = built() / "tree"
    folder = ROOT / "build" / "cpp" / "examples"
    httplib = ROOT / ".venv" / "httplib"
    commands = (
        ["cmake", "-S", ROOT / "cpp" / "examples", "-B", folder, "-G", "Ninja",
         "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={tree}",
         "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror",
         "-DCMAKE_C_FLAGS=-Wall -Wextra -Wpedantic -Wconversion -Werror",
         *([f"-Dhttplib_ROOT={httplib}"] if httplib.exists() else [])],
        ["cmake", "--build", folder, "-j", "2"],
    )  # fmt: skip
    with (folder.parent / ".lock-examples").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in commands:
            run_command(*command)
    return folder
