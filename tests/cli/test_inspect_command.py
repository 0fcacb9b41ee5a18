"""``sd35-trt inspect`` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

from bare_bundle import read_json, sign, write_bundle


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


def test_the_files_of_each_part(run, mini_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = run("inspect", mini_bundle)
    files = json.loads((mini_bundle / "bundle.json").read_text())["model"]["files"]
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        name = f"{part}/model.safetensors"
        assert f"{name} ({files[name][:12]})" in out
    assert "no T5" not in out
    write_bundle(tmp_path)  # without T5
    assert "no T5: prompts are read by CLIP alone" in run("inspect", tmp_path)[1]
