"""Output where the locale has no UTF-8, and names with brackets and bytes that are no text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASCII = {
    "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LANG": "C", "LC_ALL": "C",
    "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
}  # fmt: skip


def run_in_c(*words: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sd35_trt", *map(str, words)]
    return subprocess.run(command, env=ASCII, capture_output=True)


@pytest.mark.parametrize(
    "words",
    [("inspect",), ("bench", "--runs", 1, "--warmup", 1, "--steps", 1), ("inspect", "--engines")],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_bundle(words: tuple[object, ...], mini_bundle: Path) -> None:
    ended = run_in_c(*words, mini_bundle)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode("ascii")


@pytest.mark.parametrize("words", [("policy", "show"), ("gpus",), ("doctor",), ("--help",)])
def test_without_a_bundle(words: tuple[str, ...]) -> None:
    ended = run_in_c(*words)
    assert ended.returncode == 0, ended.stderr
    assert "?" not in ended.stdout.decode("ascii").replace("sd35-trt", "")


def test_an_error_is_still_one_line() -> None:
    ended = run_in_c("plan", "--gpu", "ada", "--vram", "8")
    assert ended.returncode == 2
    (line,) = ended.stderr.decode("utf-8").splitlines()
    assert "less than 1 MiB" in line


def test_names_are_printed_as_they_are(run, mini_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("b[v2]", "b[red]x[/]", "[/bold]", "b[/nothing]"):
        bundle = tmp_path / "folder" / name
        shutil.rmtree(bundle.parent, ignore_errors=True)
        shutil.copytree(mini_bundle, bundle)
        for words in (("inspect",), ("bench", "--runs", 1, "--warmup", 1, "--steps", 1)):
            status, out, err = run(*words, bundle)
            assert status == 0, err
            assert name in "".join(out.split("\n")), out


def test_a_name_that_is_no_text(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = os.fsencode(tmp_path) + b"/b\xff"
    shutil.copytree(os.fsencode(mini_bundle), bundle)
    command = [os.fsencode(sys.executable), b"-m", b"sd35_trt", b"inspect", bundle]
    ended = subprocess.run(command, env={**ASCII, "PYTHONUTF8": "1"}, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert b"b?" in ended.stdout


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_it_is_asked_for(  # type: ignore[no-untyped-def]
    before: str | None, after: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    if before is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", before)
    run("gpus")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == after


def test_an_embedding_program_decides_on_telemetry() -> None:
    code = "import os, sd35_trt.runtime; print(os.environ.get('ORT_DISABLE_TELEMETRY'))"
    ended = subprocess.run([sys.executable, "-c", code], env=ASCII, capture_output=True, text=True)
    assert ended.stdout.strip() == "None", ended.stderr
