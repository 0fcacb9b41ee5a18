"""``sd35-trt verify`` as a user sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import one_error_line
from models.change import change_weight


def test_verify(run, mini_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("verify", mini_bundle)
    assert status == 0
    assert "all as the manifest says" in out
    copy = tmp_path / "copy"
    shutil.copytree(mini_bundle, copy)
    (copy / "t5" / "model.onnx").unlink()
    status, _, err = run("verify", copy)
    assert status == 1
    assert "t5/model.onnx is missing" in one_error_line(err)


def test_engines_beside_their_graphs(run, tiny_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    command = ["verify", tiny_bundle, "--against", "onnxruntime", "--steps", 2]
    status, out, _ = run(*command)
    assert status == 0
    for word in ("onnxruntime on cpu", "64x64 px in 2 steps", "next_latents", "0.001"):
        assert word in out
    assert "missed" not in out
    status, out, err = run(*command, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["passed"]
    assert len(report["ports"]) == 11
    assert report["searches"] == []


def test_an_engine_that_computes_something_else(  # type: ignore[no-untyped-def]
    run, mini_bundle: Path, stage_cache: Path, tmp_path: Path
) -> None:
    """Its file agrees with the manifest, and not with the checkpoint."""
    bundle = tmp_path / "changed"
    shutil.copytree(mini_bundle, bundle)
    change_weight(bundle, "denoiser", "part.transformer_blocks.2.ff.net.2.weight")
    assert run("verify", bundle)[0] == 0
    status, out, err = run(
        "verify", bundle, "--against", "onnxruntime", "--model", "mini", "--steps", 1,
        "--cache-dir", stage_cache, "--json",
    )  # fmt: skip
    assert status == 1
    line = one_error_line(err)
    assert "denoiser's " in line
    assert "fp32 allows 0.001" in line
    (search,) = json.loads(out)["searches"]
    assert search["difference"]["operator"] == "MatMul"
    assert search["difference"]["layer"] == "transformer_blocks.2.ff.net.2"
    assert search["difference"]["input_error"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "onnxruntime", "--min-psnr", 30], "--min-psnr compares pictures"),
        (["--against", "onnxruntime", "--captions", 3], "--captions compares pictures"),
        (["--against", "half", "--device", "cpu"], "--device compares engines"),
        (["--no-bisect"], "--bisect compares engines"),
        (["--device", "cpu"], "--device compares engines"),
        (["--against", "onnxruntime", "--steps", 0], "steps must be 1 to 1000"),
        (["--against", "onnxruntime", "--seed", -1], "seed must be 0 to"),
        (["--against", "onnxruntime", "--device", "tpu"], "do not run on tpu"),
        (["--against", "onnxruntime", "--tokenizers", "."], "--tokenizers needs --model"),
        (["--against", "onnxruntime", "--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use(run, tiny_bundle: Path, arguments: list[object], words: str) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run("verify", tiny_bundle, *arguments)
    assert status in (1, 2)
    assert out == ""
    assert words in one_error_line(err)
