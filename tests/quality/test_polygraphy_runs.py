"""A graph with more outputs, as TensorRT's parser takes it through Polygraphy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from sd35_trt.backends import BACKENDS
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle
from sd35_trt.quality.onnx_graph import OnnxGraph
from sd35_trt.quality.polygraphy_runs import (
    load_polygraphy,
    marked_network,
    marked_profile,
    tensorrt_runs,
)
from sd35_trt.runtime.devices.cpu import CpuDevice


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def test_values_are_marked_by_their_names_in_the_graph(library: Any, mini_bundle: Path) -> None:
    component = Bundle.open(mini_bundle).manifest.component("denoiser")
    assert component is not None
    graph = OnnxGraph(mini_bundle / "denoiser" / "model.onnx")
    polygraphy = load_polygraphy(BACKENDS["tensorrt-rtx"])
    names = [n for n in graph.producers if n.endswith(("rms_norm", "matmul_3"))]
    assert len(names) > 4
    _, network, _ = parsed = marked_network(polygraphy, library, component, graph, names)
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    assert set(outputs) == {*graph.outputs, *names}
    feed = {
        p.name: np.zeros(p.resolve(**{d: b[0] for d, b in component.bounds.items()}), p.dtype)
        for p in component.inputs
    }
    profile = marked_profile(polygraphy, component, feed)
    assert profile["latents"].min == (1, 16, 8, 8)
    assert profile["latents"].max == (4, 16, 24, 24)
    config = polygraphy.create_config(parsed[0], network, profiles=[profile])
    assert config.num_optimization_profiles == 1
    assert not config.get_flag(library.BuilderFlag.TF32)


def test_a_failure_is_one_line(library: Any, mini_bundle: Path, capfd: Any) -> None:
    bundle = Bundle.open(mini_bundle)
    component = bundle.manifest.component("clip_l")
    assert component is not None
    graph = OnnxGraph(mini_bundle / "clip_l" / "model.onnx")
    run = tensorrt_runs(bundle, replace(component, engine="tensorrt-rtx"), graph, CpuDevice())
    with pytest.raises(Sd35Error, match=r"TensorRT for RTX .* does not run clip_l") as caught:
        run({"input_ids": np.zeros((2, 32), np.int64)}, ["there is no such value"])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == "", "it would be among what --json prints"


def test_without_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(Sd35Error, match=r"needs polygraphy — pip install 'sd35-trt\[compare\]'"):
        load_polygraphy(BACKENDS["tensorrt"])
