"""``sd35-trt inspect`` as a user sees it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bare_bundle import read_json, sign, write_bundle
from models.make import make


def test_inspect(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("inspect", mini_bundle)
    assert status == 0
    for word in ("denoiser", "next_latents f32", "batch×16×height×width", "fp32", "guidance"):
        assert word in out
    status, out, _ = run("inspect", mini_bundle, "--json")
    assert json.loads(out) == json.loads((mini_bundle / "bundle.json").read_text())


def test_what_a_gguf_file_held(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_bundle(tmp_path)
    manifest = read_json(tmp_path)
    name = "transformer/model.gguf"
    manifest["model"]["files"] = {name: "ab" * 32, "transformer/config.json": "0" * 64}
    manifest["model"]["quantization"] = {name: "310 Q4_K, 120 F16"}
    sign(tmp_path, json.dumps(manifest))
    _, out, _ = run("inspect", tmp_path)
    assert f"{name} (abababababab, 310 Q4_K, 120 F16)" in out
    assert "config.json" not in out


def test_engines(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run("inspect", mini_bundle, "--engines")
    assert (status, err) == (0, "")
    for word in ("denoiser", "ONNX, opset 23", "tokens 64 to 544", "70 fp32", "6 Attention"):
        assert word in out
    status, out, _ = run("inspect", mini_bundle, "--engines", "--json")
    denoiser = json.loads(out)["denoiser"]
    assert denoiser["layers"]["Attention"] == 6
    assert denoiser["precisions"] == {"fp32": 70}
    assert denoiser["bounds"]["batch"] == [1, 4]
    assert [port["name"] for port in denoiser["outputs"]] == ["next_latents", "denoised"]
    assert denoiser["note"] == ""


def test_what_cannot_be_seen_is_said_once(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    bundle = make(tmp_path / "bundle", tmp_path / "stages", "ada")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    status, out, err = run("inspect", bundle, "--engines")
    assert (status, err) == (0, "")
    assert "batch 1 to 4" in out
    assert out.count("is not installed") == 1
    words = " ".join(out.split())
    assert "vae_decoder, vae_encoder: TensorRT for RTX is not installed" in words
    assert "pip install 'sd35-trt[rtx]'" in words


def test_the_files_of_each_part(run, mini_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = run("inspect", mini_bundle)
    files = json.loads((mini_bundle / "bundle.json").read_text())["model"]["files"]
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        name = f"{part}/model.safetensors"
        assert f"{name} ({files[name][:12]})" in out
    assert "scheduler_config.json" not in out
    assert "no T5" not in out
    write_bundle(tmp_path)  # without T5
    assert "no T5: prompts are read by CLIP alone" in run("inspect", tmp_path)[1]
