"""A bundle of a few bytes, whole in every hash, for tests that read and do not draw."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from sd35_trt.dimensions import Defaults, Ranges
from sd35_trt.formats.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    Component,
    Manifest,
    ModelRecord,
    PolicyRecord,
    PolicyRule,
    Port,
    Scheduler,
    Tokenizer,
    describe_file,
    write_manifest,
)

#: Of every file but the manifest.
FILES = {
    "denoiser/model.onnx": b"graph",
    "denoiser/weights.data": bytes(range(256)),
    "vae_decoder/model.onnx": b"another graph",
    "tokenizer/clip_l.json": b"{}",
}


def write_bundle(root: Path) -> Manifest:
    """Write a bundle into a new directory."""
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    latents = Port("latents", "float32", ("batch", 16, "height", "width"))

    def component(name: str, *files: str) -> Component:
        return Component(
            name=name,
            engine="onnxruntime",
            files=tuple(describe_file(root, f"{name}/{file}") for file in files),
            inputs=(latents,),
            outputs=(Port("image", "uint8", ("batch", "image_height", "image_width", 3)),),
            weight_bytes=256,
            precisions={"fp32": 3},
            fp32_places={f"{name}/blocks.0": 20000.5},
            bounds={"batch": (1, 4)},
        )

    manifest = Manifest(
        model=ModelRecord("tiny", "mini", {"transformer/config.json": "0" * 64}),
        target="cpu",
        builder="onnxruntime",
        policy=PolicyRecord("fp32", "1" * 64, (PolicyRule("*", "*", "fp32", "exact"),)),
        ranges=Ranges((1, 4), (64, 128), 64, (77, 512)),
        latent_channels=16,
        latent_scale=8,
        guided=True,
        scheduler=Scheduler(3.0, 1000.0),
        defaults=Defaults(28, 4.5, (64, 64), "euler", 256),
        tokenizers={"clip_l": Tokenizer("tokenizer/clip_l.json", 77, 49407)},
        components=(
            component("denoiser", "model.onnx", "weights.data"),
            component("vae_decoder", "model.onnx"),
        ),
        files=(describe_file(root, "tokenizer/clip_l.json"),),
        versions={"python": "3.11.7"},
        command="sd35-trt build",
        created="2026-01-01T00:00:00+00:00",
        calibration=None,
        engine_options={"compute_capabilities": ["8.9"], "refit": False},
    )
    write_manifest(root, manifest)
    return manifest


def read_json(root: Path) -> dict[str, Any]:
    """The manifest as JSON."""
    data: dict[str, Any] = json.loads((root / MANIFEST).read_text("utf-8"))
    return data


def sign(root: Path, text: str) -> None:
    """Replace the manifest, with a digest that is right: as a foreign tool would."""
    data = text.encode()
    (root / MANIFEST).write_bytes(data)
    (root / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}\n")


def to_format_1(root: Path) -> None:
    """Make the manifest one of format 1, as the first versions wrote it."""
    data = msgspec.to_builtins(msgspec.json.decode((root / MANIFEST).read_bytes()))
    del data["requires"]
    data["format"] = 1
    text = json.dumps(data, sort_keys=True)
    data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (root / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    (root / MANIFEST_DIGEST).unlink()
