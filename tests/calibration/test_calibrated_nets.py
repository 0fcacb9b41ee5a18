"""Calibrating ControlNets, and building them in FP8 with what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_error
from control_nets import write_net

from sd35_trt.build import BuildOptions, build
from sd35_trt.calibration import controlnets
from sd35_trt.calibration.calibrate import CalibrateOptions, calibrate
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.export.component import fp8_layers
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.calibration import Calibration
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import load_policy
from sd35_trt.runtime import Pipeline


@pytest.fixture
def nets(tmp_path: Path) -> tuple[ControlNet, ...]:
    """With a text stream, and without."""
    root = checkpoint_path()
    paths = {name: write_net(tmp_path / name, root, name == "blur") for name in ("blur", "canny")}
    return tuple(ControlNet(name, str(path)) for name, path in paths.items())


@pytest.fixture
def options(
    nets: tuple[ControlNet, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CalibrateOptions:
    """Two pictures of mini; edges as dark as bright, so that OpenCV is not needed."""
    monkeypatch.setattr(controlnets, "canny_edges", lambda pixels: np.where(pixels > 127, 255, 0))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue circle")
    return CalibrateOptions(
        prompts=prompts, steps=2, guidance=3.0, sizes=((64, 64),), out=tmp_path / "out",
        controlnets=nets,
    )  # fmt: skip


def test_every_fp8_layer_of_the_nets_has_a_scale(options: CalibrateOptions) -> None:
    found = calibrate(options)
    model, policy = look(options), load_policy("fp8")
    linears, _ = fp8_layers(model.checkpoint, model.components, policy)
    assert set(found.inputs) == set(linears)
    for net in ("control_blur", "control_canny"):
        assert f"{net}/transformer_blocks.1.ff.net.2" in found.inputs
        assert f"{net}/controlnet_blocks.1" in found.activations
        assert f"{net}_conditioner/transformer_blocks.1.norm1.linear" in found.activations
        assert any(name.startswith(f"{net}/") for name in (found.provenance.files or ()))
    # Edges of Large's net are taken as 127.5·x + 0.5: what they make is large.
    both = [found.activations[f"control_{n}/pos_embed_input.proj"] for n in ("canny", "blur")]
    assert both[0] > both[1] > 0


@pytest.mark.nightly
def test_fp8_nets(
    options: CalibrateOptions,
    nets: tuple[ControlNet, ...],
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    stage_cache: Path,
) -> None:
    """A bundle of one of the nets takes the scales of both; it draws nearly as half does."""
    calibrate(options)
    one = nets[:1]
    path = build(
        BuildOptions(
            policy="fp8", calibration=options.out, controlnets=one, out=tmp_path / "fp8",
            cache_dir=stage_cache,
        )
    )  # fmt: skip
    net = Bundle.open(path).manifest.component("control_blur")
    assert net is not None
    assert net.precisions["fp8"] > 0
    measured = Calibration.load(options.out).inputs
    assert any(name.startswith("control_canny/") for name in measured)
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    latents = []
    for own in (path, make_bundle(policy="half", controlnets=one)):
        with Pipeline.load(own) as pipe:
            draw = {"steps": 3, "size": (64, 64), "guidance": 3.0, "t5_tokens": 32}
            controls = {"blur": picture}
            latents.append(pipe.generate("a red star", controls=controls, **draw).latents)
    assert relative_error(*latents) < 0.2
