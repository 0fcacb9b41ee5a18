"""``sd35-trt calibrate`` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import one_error_line

from sd35_trt.calibration import calibrate
from sd35_trt.cli.options import BYTES
from sd35_trt.formats.calibration import Calibration

_QUICK = ("--steps", 1, "--limit", 1, "--size", "64x64")


def test_ranges_alone(run: Any, large_checkpoint: Path) -> None:
    status, out, err = run(
        "calibrate", "--model", large_checkpoint, "--policy", "half", *_QUICK, "--out", "made",
    )  # fmt: skip
    assert status == 0
    assert "note: policy half has no FP8 layer: ranges alone" in err
    assert "drawing" in err, "progress is shown"
    artifact = Calibration.load(Path("made"))
    assert out == f"made  0 scales, {len(artifact.activations)} ranges\n"
    assert (artifact.provenance.command or "").startswith("sd35-trt calibrate --model")


def test_json(run: Any, large_checkpoint: Path) -> None:
    status, out, err = run(
        "calibrate", "--model", large_checkpoint, *_QUICK, "--out", "a/made", "--json"
    )
    assert (status, err) == (0, "")
    artifact = Calibration.load(Path("a/made"))
    assert json.loads(out) == {
        "calibration": "a/made", "digest": artifact.digest(), "scales": len(artifact.inputs),
        "ranges": len(artifact.activations),
    }  # fmt: skip


@pytest.mark.nightly
def test_sensitivity(run: Any, large_checkpoint: Path) -> None:
    status, out, _ = run(
        "calibrate", "--model", large_checkpoint, *_QUICK, "--sensitivity", "--out", "found",
    )  # fmt: skip
    assert status == 0
    lines = out.splitlines()
    assert len([line for line in lines if "third" in line]) == 15
    assert lines[-1] == "found"
    assert not Path("found/policy.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "gone.txt"], "cannot read prompt file gone.txt"),
        (["--policy", "fp9"], "unknown policy 'fp9'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--size", "100x100"], "--size 100x100 is not within 16:384"),
        (["--budget", "3MB"], "--budget needs --sensitivity"),
        (["--sensitivity", "--budget", "3 apples"], "'3 apples' is not a number of bytes"),
        (["--steps", "0"], "'--steps': 0"),
        (["--out", "file"], "file is a file or a link"),
        (["--sensitivity", "--out", "."], "is not empty and holds no sensitivity analysis"),
    ],
)
def test_refused_in_one_line(run: Any, arguments: list[str], words: str) -> None:
    Path("file").write_text("")
    status, out, err = run("calibrate", "--out", "made", *arguments)
    assert (status, out) == (2, "")
    assert words in one_error_line(err)
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("2000000", 2_000_000), ("1500.5kB", 1_500_500), ("2 MB", 2_000_000)]
)
def test_bytes(text: str, count: int) -> None:
    assert BYTES.convert(text, None, None) == count


def test_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate", interrupted)
    status, _, err = run("calibrate", "--out", "made")
    assert status == 130
    assert "the same command goes on from here" in err
