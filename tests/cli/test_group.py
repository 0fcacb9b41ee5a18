"""The command line as a whole: help, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import one_error_line

from sd35_trt.cli import COMMANDS
from sd35_trt.mini import checkpoint_path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_like_a_manual_page(command: str, run) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "Example" in out
    assert f"sd35-trt {command}" in out


def test_debug_shows_the_traceback(run) -> None:  # type: ignore[no-untyped-def]
    for arguments in (["--debug", "build", "--gpu", "x"], ["build", "--gpu", "x", "--debug"]):
        status, _, err = run(*arguments)
        assert status == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: unknown GPU 'x'")


def test_every_command_that_looks_at_a_model(run) -> None:  # type: ignore[no-untyped-def]
    """Takes another scheduler and variant, and refuses them before any work."""
    model = str(checkpoint_path())
    for words in (["build"], ["calibrate", "--out", "made"], ["plan", "--gpu", "cpu"]):
        for option, value, message in (
            ("--scheduler", "none.json", "--scheduler: none.json is missing"),
            ("--scheduler", f"{model}/vae/config.json", "asks for AutoencoderKL"),
            ("--model-variant", "large", "--model-variant large has 38 blocks of 38 heads"),
            ("--model-variant", "turbo", "use: mini, custom"),
        ):
            status, out, err = run(*words, option, value)
            assert (status != 0, out) == (True, "")
            assert message in one_error_line(err)
            assert not list(Path().iterdir())


def test_a_command_that_is_not_there(run) -> None:  # type: ignore[no-untyped-def]
    status, _, err = run("nonsense")
    assert status == 2
    assert "No such command" in one_error_line(err)


_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from sd35_trt.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["calibrate", "--out", "made"], "calibrating needs torch — pip install 'sd35-trt[build]'"),
        (["policy", "show"], "showing a policy's layers needs torch"),
        (["verify", "none", "--against", "other"], "comparing bundles needs onnx"),
    ],
)
def test_a_library_that_is_missing(command: list[str], error: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert error in one_error_line(process.stderr)
    assert not list(tmp_path.iterdir())
