"""Programs that take adapters, skip blocks and add residuals, against ONNX of the same policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calibrations import calibrate
from components import Arrays, export, run_ort, run_program
from conftest import relative_error

from sd35_trt.engines.builder import ExportedComponent
from sd35_trt.features import Features
from sd35_trt.formats.program import PROGRAM_FILE, Call, read_program
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import load_policy

FEATURES = Features((16,), inpainting=True, skip_layer_guidance=True, control_blocks=3,
                    short_steps=2)  # fmt: skip
DIMS = {"batch": 2, "tokens": 45, "height": 16, "width": 12, "samples": 4, "pixels": 48}
NOTHING = {"rank": 0, "skipped": 0, "residual_samples": 1, "residual_pixels": 1}
ADAPTERS, SKIPPED = {"rank": 16}, {"skipped": 1}
RESIDUALS = {"residual_samples": 4, "residual_pixels": 48}

#: What a step is given, by name.
KINDS = {
    "nothing": {},
    "adapters": ADAPTERS,
    "skipped": SKIPPED,
    "residuals": RESIDUALS,
    "adapters, residuals": ADAPTERS | RESIDUALS,
    "everything": ADAPTERS | {"skipped": 2} | RESIDUALS,
}


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """A denoiser with all features by a policy: dialect → folder."""
    made: dict[tuple[str, str], dict[str, Path]] = {}

    def make(policy: str, name: str = "denoiser") -> dict[str, Path]:
        if (policy, name) not in made:
            root, model = tmp_path_factory.mktemp(policy), checkpoint_path()
            own = load_policy(policy)
            calibration = calibrate(model, own) if policy == "fp8" else None
            made[policy, name] = {
                dialect: export(root / dialect, model, [name], own, calibration, dialect,
                                guided=True, features=FEATURES) / name
                for dialect in ("opset23", "program")
            }  # fmt: skip
        return made[policy, name]

    return make


def feeds(folder: Path, kind: dict[str, int], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    dims = {**DIMS, **NOTHING, **kind}
    feed: Arrays = {}
    for port in ExportedComponent.read(folder).inputs:
        shape = port.resolve(**dims)
        size = 0.1 if "modulation" in port.name or port.name.endswith(("_down", "_up")) else 1.0
        feed[port.name] = (size * rng.standard_normal(shape)).astype(port.dtype)
    if not kind.keys() & RESIDUALS:
        feed["residuals"][:] = 0
    for name in {"layer_mask", "mask"} & feed.keys():
        feed[name] = (feed[name] > 0).astype(np.float32)
    if dims["rank"]:
        feed["adapter_scales"][1] = 0
    return feed


def for_onnx(feed: Arrays) -> Arrays:
    """Without adapters, one column of zeros."""
    if feed["adapter_scales"].shape[1]:
        return feed
    return {
        name: np.zeros([size or 1 for size in value.shape], value.dtype) if not value.size and
        name.startswith(("adapter_", "attn", "ff")) else value
        for name, value in feed.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "policy", ["fp8", *(pytest.param(p, marks=pytest.mark.nightly) for p in ("half", "fp32"))]
)
def test_a_step_is_what_onnx_computes(
    policy: str, kind: str, denoisers: Callable[..., dict[str, Path]]
) -> None:
    folders = denoisers(policy)
    feed = feeds(folders["program"], KINDS[kind])
    outputs = run_ort(folders["opset23"], for_onnx(feed)), run_program(folders["program"], feed)
    expected, actual = (values["denoised"] for values in outputs)
    assert outputs[0]["change"].shape == outputs[1]["change"].shape
    if policy != "fp8":
        for name, value in outputs[0].items():
            limit = {"fp32": 1e-5, "half": 2e-3}[policy]
            assert relative_error(outputs[1][name], value) <= limit, name
        return
    exact = {name: value.astype(np.float32) for name, value in feed.items()}
    truth = run_program(denoisers("fp32")["program"], exact)["denoised"]
    by_onnx, by_program = (relative_error(value, truth) for value in (expected, actual))
    assert by_program <= 1.2 * by_onnx


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("skipped", "everything")])
def test_a_short_step_is_what_onnx_computes(
    kind: str, denoisers: Callable[..., dict[str, Path]]
) -> None:
    folders = denoisers("fp32", "denoiser_short")
    feed = feeds(folders["program"], KINDS[kind])
    expected = run_ort(folders["opset23"], for_onnx(feed))
    actual = run_program(folders["program"], feed)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-5, name


def test_what_is_not_given_calls_no_graph(denoisers: Callable[..., dict[str, Path]]) -> None:
    """Without adapters, residuals and a third branch, a step is that of a bundle without them."""
    program = read_program(denoisers("fp8")["program"] / PROGRAM_FILE)
    held = [
        step.graph
        for step in program.steps
        if isinstance(step, Call) and not any(c.holds for c in step.conditions)
    ]
    assert held == ["head", *["block0"] * 5, "block1", "change", "tail"]
