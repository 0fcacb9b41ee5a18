"""The autoencoder in half precision, on pictures as ControlNets take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from components import run_program
from conftest import relative_error
from diffusers import AutoencoderKL

from sd35_trt.calibration.controlnets import encode_hints
from sd35_trt.calibration.ranges import RangeRecorder
from sd35_trt.checkpoints.single_file import open_checkpoint
from sd35_trt.export.component import ExportOptions, export_component
from sd35_trt.export.scales import HALF_MAX, Scales
from sd35_trt.features import Features
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import load_policy

# How Large's net for edges takes them: 0.5 to 128 instead of -1 to 1.
EDGES = (0.5, 0.5, 1.0)
OPTIONS = ExportOptions(clip_tokens=77, dialect="program", features=Features(control_blocks=1))


def pictures() -> np.ndarray:
    """Sparse edges, and as much white as there may be."""
    rng = np.random.default_rng(0)
    edges = np.where(rng.random((64, 64, 1)) < 0.05, 255, 0)
    return np.repeat(np.stack([edges, np.full_like(edges, 255)]).astype(np.uint8), 3, axis=3)


def in_half(checkpoint: Path, out: Path, amax: Mapping[str, float] | None = None) -> np.ndarray:
    """Latents by the program of the policy ``half``, each operator rounding to FP16."""
    ranges = None if amax is None else Calibration({}, dict(amax), {}, Provenance())
    scales = None if ranges is None else Scales.of(ranges, "vae")
    out.mkdir()
    own = open_checkpoint(checkpoint)
    export_component("vae_encoder", own, load_policy("half"), OPTIONS, out, scales=scales)
    feed = {"image": pictures(), "encoding": np.array([EDGES] * 2, np.float32)}
    with np.errstate(all="ignore"):
        return run_program(out, feed)["latents"]


def autoencoder(checkpoint: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(checkpoint, subfolder="vae").float().eval()


@pytest.mark.parametrize("model", ["mini", "large"])
def test_edges_are_within_the_range_of_fp16(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = checkpoint_path() if model == "mini" else request.getfixturevalue("large_checkpoint")
    expected = encode_hints(autoencoder(root), pictures(), EDGES).numpy()
    latents = in_half(root, tmp_path / "half")
    assert np.isfinite(latents).all()
    assert relative_error(latents, expected) <= 5e-3


@pytest.mark.nightly
def test_an_autoencoder_that_exceeds_fp16_on_edges_alone(
    large_checkpoint: Path, tmp_path: Path
) -> None:
    """A calibration with the net sees it, and what exceeds the range is in FP32."""
    vae = autoencoder(large_checkpoint)
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1000
    vae.save_pretrained(tmp_path / "model" / "vae")
    for other in large_checkpoint.iterdir():
        if other.name != "vae":
            (tmp_path / "model" / other.name).symlink_to(other)
    recorder = RangeRecorder("vae", vae)
    usual = encode_hints(vae, pictures(), (1 / 127.5, -1.0, 1.0))
    assert usual.isfinite().all()
    assert max(recorder.amax.values()) < HALF_MAX
    expected = encode_hints(vae, pictures(), EDGES).numpy()
    assert max(recorder.amax.values()) > HALF_MAX
    assert not np.isfinite(in_half(tmp_path / "model", tmp_path / "alone")).all()
    latents = in_half(tmp_path / "model", tmp_path / "guarded", recorder.amax)
    assert relative_error(latents, expected) <= 5e-3
