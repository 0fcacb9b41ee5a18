"""What is in an engine, of each kind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bare_bundle import write_bundle
from models.make import make

from sd35_trt.backends import BACKENDS, resolve
from sd35_trt.formats.bundle import Bundle
from sd35_trt.quality.contents import look_inside
from sd35_trt.quality.plan_contents import plan_contents


def test_every_kind_can_be_looked_into() -> None:
    for backend in BACKENDS.values():
        assert backend.contents is not None
        assert callable(resolve(backend.contents))
        assert backend.marked_runs is None or callable(resolve(backend.marked_runs))


def test_graphs(tiny_bundle: Path) -> None:
    contents = look_inside(Bundle.open(tiny_bundle))
    assert contents["denoiser"].form == "ONNX, opset 23"
    assert contents["denoiser"].layers["Conv"] == 1
    assert contents["vae_decoder"].layers == {
        "Conv": 1, "Tanh": 1, "Resize": 1, "Mul": 1, "Add": 1, "Round": 1, "Transpose": 1, "Cast": 1
    }  # fmt: skip
    assert contents["denoiser"].precisions == {"fp32": 1}, "weights that have a layer's name"


def test_programs(tiny_programs: Path) -> None:
    contents = look_inside(Bundle.open(tiny_programs))
    assert contents["denoiser"].form.startswith("program, PyTorch ")
    assert contents["clip_l"].layers["aten.tanh.default"] == 1
    assert {c.note for c in contents.values()} == {""}


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    contents = look_inside(Bundle.open(tmp_path))
    assert "model.onnx is no ONNX graph" in contents["denoiser"].note
    assert contents["denoiser"].layers == {}


def test_what_the_inspector_says() -> None:
    """Of TensorRT 10 and of 11, whose fields have other names."""

    def layer(kind: str, *types: str) -> dict[str, Any]:
        return {
            "Name": "x", "LayerType": kind,
            "Inputs": [{"Name": "a", "Format/Datatype": types[0]}],
            "Outputs": [{"Name": "b", "Datatype": types[-1], "Format": "Row major linear"}],
        }  # fmt: skip

    contents = plan_contents(
        "plan",
        [
            layer("gemm", "Row major linear FP8 format", "Half"),
            layer("gemm", "E4M3", "FLOAT8E4M3"),
            layer("kgen", "Row major linear FP16 format", "Float"),
            layer("kgen", "Row major linear FP32", "FLOAT"),
            layer("kgen", "BFloat16"),
            layer("cast", "INT64", "INT32"),
            {"Name": "y", "LayerType": "NoOp", "Inputs": [], "Outputs": None},
        ],
    )
    assert contents.layers == {"gemm": 2, "kgen": 3, "cast": 1, "NoOp": 1}
    assert contents.precisions == {
        "fp8": 2, "half": 1, "fp32": 1, "bf16": 1, "int32": 1, "other": 1
    }  # fmt: skip
    older = plan_contents("plan", ["one", "two"])
    assert older.layers == {"layer": 2}
    assert "build it again" in older.note


class _Library(SimpleNamespace):
    """Stands for TensorRT: a plan that loads, or none."""

    def __init__(self, engine: Any, error: str = "") -> None:
        class ILogger:
            ERROR = 1

        def runtime(log: Any) -> Any:
            if error:
                log.log(1, error)
            return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)

        super().__init__(
            __version__="11.2.1", ILogger=ILogger, Runtime=runtime,
            LayerInformationFormat=SimpleNamespace(JSON=2),
        )  # fmt: skip


@pytest.fixture
def plans(tmp_path: Path) -> Bundle:
    return Bundle.open(make(tmp_path / "bundle", tmp_path / "stages", "ada"))


def test_plans(plans: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"Layers": [{"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}]}'
    inspector = SimpleNamespace(get_engine_information=lambda form: text if form == 2 else "")
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", _Library(engine))
    contents = look_inside(plans)["denoiser"]
    assert contents.form == "plan, TensorRT for RTX 11.2.1"
    assert (contents.layers, contents.precisions) == ({"gemm": 1}, {"half": 1})


def test_plans_where_their_library_or_gpu_is_missing(
    plans: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    note = look_inside(plans)["denoiser"].note
    assert note.startswith("TensorRT for RTX is not installed")
    assert "pip install 'sd35-trt[rtx]'" in note
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", _Library(None, "no device of sm89"))
    note = look_inside(plans)["denoiser"].note
    assert "does not load the plan here: no device of sm89 — look on the GPU" in note
    assert "\n" not in note
