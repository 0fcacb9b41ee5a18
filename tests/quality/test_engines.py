"""``sd35-trt verify --against onnxruntime``: engines beside the graphs behind them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeTensorRT, install_fake
from models.change import change_weight
from models.make import make

from sd35_trt.cli.tables.engines import failures, print_comparison
from sd35_trt.formats.bundle import Bundle
from sd35_trt.quality import engines
from sd35_trt.quality.engines import BOUNDS, compare_engines

COMPONENTS = (
    "clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder", "vae_encoder"
)  # fmt: skip


def graphs_of(root: Path) -> dict[str, Path]:
    return {name: root / name / "model.onnx" for name in COMPONENTS}


@pytest.fixture
def changed_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Its denoiser has another weight than the graphs of ``tiny_bundle``."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "changed"))
    change_weight(bundle, "denoiser", "proj_out.weight")
    return bundle


def test_equal_engines(tiny_bundle: Path) -> None:
    comparison = compare_engines(Bundle.open(tiny_bundle), graphs_of(tiny_bundle), steps=2)
    assert comparison.passed
    assert {port.component for port in comparison.ports} == set(COMPONENTS)
    assert (comparison.device, comparison.size, comparison.searches) == ("cpu", (64, 64), ())
    for port in comparison.ports:
        assert port.error is not None
        assert port.error < 1e-5
        assert (port.precision, port.bound) == ("fp32", BOUNDS["fp32"])


def test_programs_beside_graphs(tiny_programs: Path, tiny_bundle: Path) -> None:
    comparison = compare_engines(
        Bundle.open(tiny_programs), graphs_of(tiny_bundle), steps=2, device="cpu"
    )
    assert comparison.passed
    assert comparison.builder == "inductor"
    errors = [port.error for port in comparison.ports]
    assert any(errors), "another library computes in another order"


def test_plans_beside_graphs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD35_TRT_CACHE", str(tmp_path / "cache"))
    plans = make(tmp_path / "bundle", tmp_path / "stages", "ada")
    fake = install_fake(monkeypatch)
    library = FakeTensorRT("tensorrt-rtx", fake, plans, tiny_bundle)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    comparison = compare_engines(Bundle.open(plans), graphs_of(tiny_bundle), steps=2)
    assert comparison.passed
    assert (comparison.builder, comparison.device) == ("tensorrt-rtx", "cuda:0")


def test_the_changed_layer_is_named(
    changed_bundle: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare_engines(Bundle.open(changed_bundle), graphs_of(tiny_bundle), steps=2)
    assert not comparison.passed
    missed = {port.component for port in comparison.ports if not port.passed}
    assert missed == {"denoiser"}, "each component gets the reference's inputs"
    (search,) = comparison.searches
    assert search.difference is not None
    graph = onnx.load(tiny_bundle / "denoiser" / "model.onnx", load_external_data=False).graph
    (node,) = (n for n in graph.node if "proj_out.weight" in n.input)
    assert search.difference.node == node.name
    assert search.difference.operator == "MatMul"
    assert search.difference.input_error < 1e-5
    print_comparison(comparison)
    words = " ".join(capsys.readouterr().out.split())
    assert f"denoiser: the first to differ is MatMul {node.name}: error" in words
    assert words.count("missed") == 2
    (failure,) = failures(comparison)
    assert failure.startswith("denoiser's ")
    without = compare_engines(
        Bundle.open(changed_bundle), graphs_of(tiny_bundle), steps=2, bisect=False
    )
    assert without.searches == ()
    assert [port.passed for port in without.ports] == [port.passed for port in comparison.ports]


def test_an_engine_that_cannot_be_searched_says_why(
    tiny_programs: Path, changed_bundle: Path
) -> None:
    comparison = compare_engines(
        Bundle.open(tiny_programs), graphs_of(changed_bundle), steps=2, device="cpu"
    )
    assert not comparison.passed
    (search,) = comparison.searches
    assert (search.component, search.difference) == ("denoiser", None)
    assert search.note == "PyTorch on cpu does not run the graph with more outputs"


def test_an_engine_that_is_not_finite(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        session = open_session(*arguments)
        run = session.run

        def overflow(inputs: Any, outputs: Any) -> None:
            run(inputs, outputs)
            if "hidden" in outputs:
                outputs["hidden"][0, 0, 0] = np.nan

        session.run = overflow
        return session

    open_session = engines.open_session
    monkeypatch.setattr(engines, "open_session", broken)
    comparison = compare_engines(
        Bundle.open(tiny_bundle), graphs_of(tiny_bundle), steps=1, bisect=False
    )
    missed = {(port.component, port.error) for port in comparison.ports if not port.passed}
    assert missed == {("clip_l", None), ("clip_g", None), ("t5", None)}
