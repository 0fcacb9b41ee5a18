"""``sd35-trt doctor`` as a user sees it."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from typing import Any

import onnxruntime
import pytest
import torch
from fake_nvml import Nvml

from sd35_trt.cli import diagnosis


def test_doctor(run) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("doctor")
    assert status == 0
    assert "yes, onnxruntime" in out
    status, out, _ = run("doctor", "--json")
    findings = json.loads(out)
    assert findings["targets"]["cpu"]["builds"]
    assert findings["targets"]["cpu"]["runs"]
    assert not findings["targets"]["ada"]["runs"]


def test_doctor_knows_the_gpu(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml((8, 6)))
    status, out, _ = run("doctor")
    assert status == 0
    assert "GPUs: NVIDIA RTX A2000 (compute capability 8.6, 6 GiB)" in out
    findings = json.loads(run("doctor", "--json")[1])
    runs = {name: target["runs"] for name, target in findings["targets"].items()}
    assert runs == {
        "cpu": True, "turing": False, "ampere": True, "ada": False, "hopper": False,
        "blackwell": False,
    }  # fmt: skip
    monkeypatch.setattr(diagnosis, "_CUDA", "not-installed")
    assert "to run: pip install 'sd35-trt[cuda]'" in run("doctor")[1]


def test_doctor_says_why_a_library_does_not_work(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    engines = json.loads(run("doctor", "--json")[1])["engines"]
    assert (engines["onnxruntime"]["version"], engines["onnxruntime"]["problem"]) == (
        onnxruntime.__version__, None,
    )  # fmt: skip
    # Of TensorRT, PyPI has the bindings; here not even those are installed.
    assert "TensorRT is not installed" in engines["tensorrt"]["problem"]
    assert "pip install 'sd35-trt[tensorrt]'" in engines["tensorrt"]["problem"]

    class Lacking(types.ModuleType):
        __version__ = "11.2.1"
        ILogger = type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1})

        @staticmethod
        def Builder(log: Any) -> None:
            log.log(1, "Unable to load library: libnvinfer_builder_resource_sm90.so.11.2.1")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    lacking = Lacking("tensorrt")
    lacking.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", lacking)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml((9, 0)))
    status, out, err = run("doctor")
    assert status == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("TensorRT 11"))
    for word in ("11.2.1 cannot start", "libnvinfer_builder_resource_sm90", "another version"):
        assert word in line
    hopper = json.loads(run("doctor", "--json")[1])["targets"]["hopper"]
    assert (hopper["builder"], hopper["builds"], hopper["runs"]) == ("tensorrt", False, False)
    assert hopper["note"] == "TensorRT: see above"


def test_doctor_takes_a_library_however_it_was_installed(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """NVIDIA's images and Debian packages install no package of PyPI's name."""

    class Whole(types.ModuleType):
        __version__ = "10.6.0"
        ILogger = type("ILogger", (), {"__init__": lambda self: None})
        Builder = staticmethod(lambda log: object())

    whole = Whole("tensorrt")
    whole.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", whole)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml((9, 0)))
    hopper = json.loads(run("doctor", "--json")[1])["targets"]["hopper"]
    assert (hopper["builds"], hopper["runs"], hopper["runtime"], hopper["note"]) == (
        True, True, "TensorRT 10.6.0", "",
    )  # fmt: skip


def test_doctor_names_what_is_faster(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml((9, 0)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    hint = "faster with: pip install 'sd35-trt[hopper]'"
    assert hint in run("doctor")[1]
    installed = diagnosis.installed_version
    monkeypatch.setattr(
        diagnosis,
        "installed_version",
        lambda name: "4.0" if name == "flash-attn-4" else installed(name),
    )
    assert hint not in run("doctor")[1]


def test_doctor_knows_a_pytorch_without_cuda(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml((9, 0)))
    for cuda, runs in ((None, False), ("13.0", True)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        facts = json.loads(run("doctor", "--json")[1])["targets"]["hopper"]
        assert facts["runs"] == runs
        assert ("to run: a PyTorch with CUDA" in facts["note"]) == (not runs)
