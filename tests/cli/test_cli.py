"""The command line as a user sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import one_error_line
from PIL import Image

from sd35_trt.cli import main


@pytest.mark.parametrize("command", main.commands)
def test_help_reads_like_a_manual_page(command: str, run) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "Example" in out
    assert f"sd35-trt {command}" in out


def test_generate_writes_a_picture_with_its_parameters(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(
        "generate", mini_bundle, "a red star", "--seed", 5, "--steps", 3, "--size", "192x128",
        "--negative", "blue", "--guidance", 3, "--shift", 2, "--sampler", "dpmpp-2m",
    )  # fmt: skip
    assert (status, out) == (0, "out.png\n")
    with Image.open("out.png") as image:
        assert image.size == (192, 128)
        kept = json.loads(image.text["sd35-trt"])  # type: ignore[attr-defined]
    assert kept["prompt"] == "a red star"
    assert kept["negative"] == "blue"
    assert kept["seed"] == 5
    assert (kept["steps"], kept["guidance"], kept["shift"]) == (3, 3.0, 2.0)
    assert kept["sampler"] == "dpmpp-2m"


def test_a_batch_makes_numbered_files(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(
        "generate", mini_bundle, "a red star", "--seed", 8, "--steps", 2, "--batch", 2,
        "--out", "star.png", "--json",
    )  # fmt: skip
    assert status == 0
    data = json.loads(out)
    assert data["files"] == ["star-8.png", "star-9.png"]
    assert data["seconds"]["total"] > 0
    pictures = [np.asarray(Image.open(file)) for file in data["files"]]
    assert (pictures[0] != pictures[1]).any()


def test_image_to_image(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    Image.new("RGB", (128, 128), "navy").save("in.png")
    status, _, _ = run("generate", mini_bundle, "a star", "--steps", 4, "--image", "in.png")
    assert status == 0
    assert Path("out.png").is_file()


def test_wrong_use_of_generate(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    Path("text.png").write_text("no picture")
    cases: list[tuple[list[object], int, str]] = [
        (["--size", "100x100"], 2, "the nearest is 128x128"),
        (["--size", "big"], 2, "is not WxH"),
        (["--steps", "-1"], 2, "steps must be 1 to 1000, not -1"),
        (["--steps", "many"], 2, "is not a valid integer"),
        (["--out", "x.jpg"], 2, "does not end in .png"),
        (["--out", "no/such/x.png"], 2, "is not a writable directory"),
        (["--image", "none.png"], 2, "none.png is missing"),
        (["--image", "text.png"], 2, "not a readable picture"),
        (["--colour"], 2, "No such option"),
    ]
    for arguments, expected, words in cases:
        status, out, err = run("generate", mini_bundle, "a star", *arguments)
        assert status == expected, arguments
        assert out == ""
        assert words in one_error_line(err)
    assert sorted(p.name for p in Path().iterdir()) == ["text.png"]
    status, _, err = run("generate", "nowhere", "a star")
    assert status == 1
    assert "is not a bundle" in one_error_line(err)


def test_long_prompts_are_noted(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run("generate", mini_bundle, "x" * 10_000, "--steps", 1)
    assert (status, out) == (0, "out.png\n")
    assert "the rest is ignored" in err


def test_inspect(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("inspect", mini_bundle)
    assert status == 0
    for word in ("denoiser", "next_latents f32", "batch×16×height×width", "fp32", "guidance"):
        assert word in out
    status, out, _ = run("inspect", mini_bundle, "--json")
    assert json.loads(out) == json.loads((mini_bundle / "bundle.json").read_text())


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


def test_doctor(run) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("doctor")
    assert status == 0
    assert "yes, onnxruntime" in out
    status, out, _ = run("doctor", "--json")
    findings = json.loads(out)
    assert findings["targets"]["cpu"]["builds"]
    assert findings["targets"]["cpu"]["runs"]
    assert not findings["targets"]["ada"]["runs"]


def test_policy_show(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("policy", "show", "--policy", "int8-weight")
    assert status == 0
    for word in ("transformer_blocks.N.attn.to_q", "int8-weight", "proj_out", "all"):
        assert word in out
    status, out, _ = run("policy", "show", "--policy", "fp32", "--json")
    entries = json.loads(out)
    # The same bytes as the export writes, component by component.
    manifest = json.loads((mini_bundle / "bundle.json").read_text())
    for component in manifest["components"]:
        listed = sum(e["bytes"] for e in entries if e["component"] == component["name"])
        assert listed == pytest.approx(component["weight_bytes"], rel=0.001)
    attention = Path(__file__).parents[2] / "benchmarks" / "attention-fp8.toml"
    status, out, _ = run("policy", "show", "--policy", str(attention), "--json")
    matmuls = [e for e in json.loads(out) if not e["shape"]]
    assert [(e["precision"], e["bytes"]) for e in matmuls] == [("fp8", 0)] * 6
    assert {e["rule"] for e in matmuls} == {"transformer_blocks.*.attn"}
    status, _, err = run("policy", "show", "--policy", "none")
    assert status == 2
    assert "unknown policy" in one_error_line(err)


def test_wrong_use_of_build(run) -> None:  # type: ignore[no-untyped-def]
    cases: list[tuple[list[object], int, str]] = [
        (["--gpu", "voodoo"], 2, "known: cpu, turing"),
        (["--model", "./none"], 1, "is not a directory"),
        (["--model", "none/"], 1, "is not a directory"),
        (["--policy", "fp7"], 2, "unknown policy"),
        (["--batch", "4:1"], 2, "--batch 4:1"),
        (["--size", "big"], 2, "is not MIN:MAX"),
    ]
    for arguments, expected, words in cases:
        status, out, err = run("build", *arguments)
        assert (status, out) == (expected, ""), arguments
        assert words in one_error_line(err)
    assert not list(Path().iterdir())
    status, _, err = run("nonsense")
    assert status == 2
    assert "No such command" in one_error_line(err)


def test_debug_shows_the_traceback(run) -> None:  # type: ignore[no-untyped-def]
    for arguments in (["--debug", "build", "--gpu", "x"], ["build", "--gpu", "x", "--debug"]):
        status, _, err = run(*arguments)
        assert status == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: unknown GPU 'x'")


def test_build_reports_json(run, stage_cache: Path, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("build", "--cache-dir", stage_cache, "--json")
    assert status == 0
    data = json.loads(out)
    assert data["bundle"] == "bundles/mini-cpu"
    assert data["bytes"] > 1e6
    manifest = json.loads(Path("bundles/mini-cpu/bundle.json").read_text())
    assert manifest["command"].startswith("sd35-trt build")
