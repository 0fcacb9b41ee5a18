"""The two components of a ControlNet are diffusers' net, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from components import Arrays, Run, export, run_ort, run_program
from conftest import relative_error
from control_nets import write_net
from diffusers import SD3ControlNetModel, SD3Transformer2DModel

from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.formats.program import PROGRAM_FILE, read_program
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import load_policy
from sd35_trt.policies.fp8 import fp8_linears

NAMES = ("control_own_conditioner", "control_own")


def model_path(model: str, request: pytest.FixtureRequest) -> Path:
    if model == "mini":
        return checkpoint_path()
    return Path(request.getfixturevalue(f"{model}_checkpoint"))


def diffusers_net(net: Path, checkpoint: Path) -> SD3ControlNetModel:
    """As diffusers' pipeline completes it."""
    model = SD3ControlNetModel.from_pretrained(net).eval()
    if not model.config.use_pos_embed:
        transformer = SD3Transformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
        model.pos_embed = model._get_pos_embed_from_transformer(transformer)
    return model


def arguments(model: SD3ControlNetModel, batch: int, height: int, width: int) -> Arrays:
    """Of a step of both branches."""
    rng = np.random.default_rng(batch + height)
    config = model.config

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    feed = {
        "latents": normal(batch, 16, height, width),
        "hint": normal(batch, 16, height, width),
        "pooled": normal(2 * batch, config.pooled_projection_dim),
        "timesteps": np.array([812.5, 30.0], np.float32),
        "scale": rng.uniform(0.2, 1.5, batch).astype(np.float32),
    }
    if config.joint_attention_dim is not None:
        feed["prompt_embeds"] = normal(2 * batch, 23, config.joint_attention_dim)
    return feed


def expected(model: SD3ControlNetModel, feed: Arrays, step: int) -> np.ndarray:
    """[blocks, samples, tokens, D]."""
    double = {k: torch.from_numpy(np.concatenate([feed[k]] * 2)) for k in ("latents", "hint")}
    pooled = torch.from_numpy(feed["pooled"])
    text = feed.get("prompt_embeds")
    with torch.no_grad():
        (samples,) = model(
            hidden_states=double["latents"],
            controlnet_cond=double["hint"],
            conditioning_scale=1.0,
            encoder_hidden_states=None if text is None else torch.from_numpy(text),
            pooled_projections=(
                pooled * 0 if model.config.force_zeros_for_pooled_projection else pooled
            ),
            timestep=torch.full((len(pooled),), float(feed["timesteps"][step])),
            return_dict=False,
        )
    scales = np.tile(feed["scale"], 2)[:, None, None]
    return np.stack([sample.numpy() * scales for sample in samples])


def residuals(
    root: Path, feed: Arrays, step: int, others: np.ndarray, run: Run = run_ort
) -> np.ndarray:
    names = ("pooled", "timesteps", "prompt_embeds")
    conditioned = run(root / NAMES[0], {k: feed[k] for k in names if k in feed})
    inputs = {k: feed[k] for k in ("latents", "hint", "scale")}
    inputs |= {"modulation": conditioned["modulation"][step], "residuals": others}
    if "context" in conditioned:
        inputs["context"] = conditioned["context"]
    return run(root / NAMES[1], inputs)["next_residuals"]


def nothing(model: SD3ControlNetModel) -> np.ndarray:
    return np.zeros((len(model.transformer_blocks), 1, 1, model.inner_dim), np.float32)


CASES: dict[str, dict[str, Any]] = {
    "mini": {},
    "large": {},
    "medium": {"dual_attention_layers": (0,), "force_zeros_for_pooled_projection": False},
}


RUNS: dict[str, Run] = {"opset23": run_ort, "program": run_program}


@pytest.mark.parametrize("dialect", RUNS)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    "model",
    ["mini", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("large", "medium"))],
)
def test_as_diffusers_computes(
    model: str, joint: bool, dialect: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = model_path(model, request)
    net = write_net(tmp_path / "net", checkpoint, joint, **(CASES[model] if joint else {}))
    given = [ControlNet("own", str(net))]
    root = export(
        tmp_path / "out", checkpoint, NAMES, "fp32", dialect=dialect, guided=True, nets=given
    )
    run = RUNS[dialect]
    peer = diffusers_net(net, checkpoint)
    for batch, height, width in ((1, 8, 8), (3, 12, 20)):
        feed = arguments(peer, batch, height, width)
        for step in (0, 1):
            wanted = expected(peer, feed, step)
            alone = residuals(root, feed, step, nothing(peer), run)
            assert relative_error(alone, wanted) <= 1e-5
            # What other nets made is added.
            both = residuals(root, feed, step, wanted * 0.5, run)
            assert relative_error(both, wanted * 1.5) <= 1e-5
    # Without a scale there is nothing, whatever the net computes.
    feed["scale"] = np.zeros_like(feed["scale"])
    feed["hint"] = np.full_like(feed["hint"], np.inf)
    assert not residuals(root, feed, 0, nothing(peer), run).any()


@pytest.mark.parametrize("policy", ["half", "int8-weight"])
@pytest.mark.parametrize("joint", [True, False])
def test_policies(policy: str, joint: bool, tmp_path: Path) -> None:
    """A policy's precisions are those of a net's layers, and little is lost."""
    checkpoint = checkpoint_path()
    net = write_net(tmp_path / "net", checkpoint, joint)
    given = [ControlNet("own", str(net))]
    root = export(tmp_path / "out", checkpoint, NAMES, policy, guided=True, nets=given)
    peer = diffusers_net(net, checkpoint)
    feed = arguments(peer, 1, 8, 8)
    assert relative_error(residuals(root, feed, 1, nothing(peer)), expected(peer, feed, 1)) <= 0.02


@pytest.mark.parametrize("joint", [True, False])
def test_fp8_as_a_program(joint: bool, tmp_path: Path) -> None:
    """Blocks of nets are fused too; as exact as ONNX makes it."""
    checkpoint = checkpoint_path()
    net = write_net(tmp_path / "net", checkpoint, joint)
    given = [ControlNet("own", str(net))]
    peer = diffusers_net(net, checkpoint)
    linears = [n for n, m in peer.named_modules() if isinstance(m, torch.nn.Linear)]
    names = fp8_linears(NAMES[1], linears, load_policy("fp8"))
    calibration = Calibration(dict.fromkeys(names, 8.0), {}, {}, Provenance())
    feed = arguments(peer, 2, 8, 12)
    wanted = expected(peer, feed, 1)
    errors = {}
    for dialect, run in RUNS.items():
        root = tmp_path / dialect
        export(root, checkpoint, NAMES, "fp8", calibration, dialect, guided=True, nets=given)
        errors[dialect] = relative_error(residuals(root, feed, 1, nothing(peer), run), wanted)
    assert errors["program"] <= 1.2 * errors["opset23"] <= 0.2, errors
    graphs = read_program(root / NAMES[1] / PROGRAM_FILE).graphs
    targets = {node.target for node in graphs["block0"].nodes}
    assert {"sd35.qkv.default", "sd35.gated.default"} <= targets
