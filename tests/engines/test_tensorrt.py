"""Plans of TensorRT for RTX, compiled without a GPU; what runs them is not tested here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import one_error_line, relative_error
from fake_gpu import install_fake
from onnx import helper

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.compat.tensorrt_plan import read_header
from sd35_trt.dimensions import MAX_STEPS_AT_ONCE, Defaults, Ranges, dimension_bounds
from sd35_trt.engines.builder import EngineOptions, ExportedComponent, load_builder
from sd35_trt.errors import BundleError, Sd35Error, UsageError
from sd35_trt.export.component import ExportOptions, export_component
from sd35_trt.export.inventory import inventory
from sd35_trt.formats.bundle import MANIFEST, Bundle, Component
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import Policy, Rule, load_policy
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.sessions.onnxruntime import OnnxRuntimeSession, session_options
from sd35_trt.runtime.sessions.session import SessionOptions
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def ada_bundle(make_bundle: Callable[..., Path]) -> Path:
    """What ``sd35-trt build --gpu ada`` makes; never write to it."""
    return make_bundle(target="ada")


def _write_component(
    folder: Path,
    nodes: list[onnx.NodeProto],
    dtype: type = np.float16,
    weights: dict[str, np.ndarray] | None = None,
    output: type | None = None,
) -> Path:
    """A component of a few operators, as a finished stage: x to y, [batch, 8, 16, 64].

    Args:
        dtype: of both, as the component describes itself.
        output: type of y in the graph, where it is another.
    """
    weights = weights or {}
    shape = ["batch", 8, 16, 64]
    x, y = (
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(t)), shape)
        for name, t in (("x", dtype), ("y", output or dtype))
    )
    arrays = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], arrays)
    opset = [helper.make_opsetid("", 23)]
    port = {"name": "x", "dtype": np.dtype(dtype).name, "shape": shape}
    described = {
        "name": "small",
        "weight_bytes": sum(a.nbytes for a in weights.values()),
        "inputs": [port],
        "outputs": [{**port, "name": "y"}],
        "precisions": {},
        "fp32_places": {},
        "largest_layer_bytes": max((a.nbytes for a in weights.values()), default=0),
        "allocated_bytes": 0,
    }

    def run(out: Path, progress: Callable[[float, str], None]) -> None:
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), out / "model.onnx")
        (out / "weights.data").write_bytes(b"")
        (out / "component.json").write_text(json.dumps(described))

    return run_stage(StageCache(folder), Stage("small", {}, (), run), lambda *_: None)


def _compile(
    folder: Path,
    out: Path,
    *capabilities: str,
    options: EngineOptions | None = None,
    notes: list[tuple[float, str]] | None = None,
) -> Path:
    """The plan of a component; its dynamic dimensions are 1 to 4."""
    builder = load_builder("tensorrt-rtx", capabilities, options)
    component = ExportedComponent.read(folder)
    bounds = {d: (1, 2, 4) for port in component.inputs for d in port.dynamic}
    stage = builder.stage(component, bounds)
    assert stage is not None
    out.mkdir(parents=True, exist_ok=True)
    stage.run(
        out, lambda fraction, note: (notes if notes is not None else []).append((fraction, note))
    )
    return out / "engine.plan"


def _relu() -> list[onnx.NodeProto]:
    return [helper.make_node("Relu", ["x"], ["y"], "relu")]


def test_build_for_ada(ada_bundle: Path) -> None:
    manifest = Bundle.open(ada_bundle, verify=True).manifest
    assert (manifest.target, manifest.builder) == ("ada", "tensorrt-rtx")
    assert manifest.policy.name == "fp8"
    assert manifest.engine_options == {
        "compute_capabilities": ["8.9"], "weight_streaming": False, "refit": False,
    }  # fmt: skip
    assert manifest.versions["tensorrt-rtx"] == rtx.__version__
    assert {c.name for c in manifest.components} == {
        "clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder", "vae_encoder",
    }  # fmt: skip
    for component in manifest.components:
        (file,) = component.files
        header = read_header(ada_bundle / file.path)
        assert header.compute_capabilities == ("8.9",)
        assert header.version == rtx.__version__
        assert header.weight_bytes == component.weight_bytes
        assert component.activation_bytes is not None
        assert component.activation_bytes > 0
        assert component.bounds.keys() == {d for port in component.inputs for d in port.dynamic}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("gpu", "policy", "capability"),
    [
        ("turing", "int8-weight", ("7.5",)),
        ("ampere", "int8-weight", ("8.0", "8.6")),
        ("blackwell", "fp8", ("12.0",)),
        ("ada,turing", "int8-weight", ("7.5", "8.9")),
    ],
)
def test_build_for_other_families(
    make_bundle: Callable[..., Path], gpu: str, policy: str, capability: tuple[str, ...]
) -> None:
    bundle = Bundle.open(make_bundle(target=gpu), verify=True)
    assert bundle.manifest.target == gpu.replace(",", "+")
    assert bundle.manifest.policy.name == policy
    assert len(bundle.manifest.components) == 7
    for component in bundle.manifest.components:
        header = read_header(bundle.path(component.files[0].path))
        assert header.compute_capabilities == capability


def test_fp8_weights_are_stored_in_8_bits(ada_bundle: Path) -> None:
    """The weights in the plans are as large as the policy says, within 3 %."""
    predicted: dict[str, int] = {}
    for entry in inventory(Checkpoint(checkpoint_path()), load_policy("fp8")):
        predicted[entry.component] = predicted.get(entry.component, 0) + entry.bytes
    for component in Bundle.open(ada_bundle).manifest.components:
        assert component.weight_bytes == pytest.approx(predicted[component.name], rel=0.03)


def test_the_graph_behind_the_plan_computes_what_fp32_does(
    make_bundle: Callable[..., Path], mini_bundle: Path
) -> None:
    """On a step of a drawing; ONNX Runtime, through Polygraphy, stands in for the GPU."""
    import onnxruntime as ort
    from polygraphy.backend.onnxrt import OnnxrtRunner

    steps: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    class Watched(OnnxRuntimeSession):
        def run(self, inputs: Any, outputs: Any) -> None:
            super().run(inputs, outputs)
            if "sigma" in inputs:
                steps.append(
                    tuple({k: v.copy() for k, v in arrays.items()} for arrays in (inputs, outputs))
                )

    def watch(
        bundle: Bundle, component: Component, device: Device, options: SessionOptions
    ) -> Watched:
        path = bundle.path(component.files[0].path)
        return Watched(str(path), component.name, device, session_options(options.threads))

    with Pipeline(Bundle.open(mini_bundle), open_session=watch) as pipe:
        pipe.generate(["a large red star", "a blue square"], seed=1, steps=4, guidance=1.0)
    inputs, reference = steps[1]
    # The same stage that the plan is compiled from.
    bundle = make_bundle(policy="fp8")
    component = Bundle.open(bundle).manifest.component("denoiser")
    assert component is not None
    path = str(bundle / component.files[0].path)
    with OnnxrtRunner(lambda: ort.InferenceSession(path, session_options(fp8=True))) as runner:
        outputs = runner.infer({p.name: inputs[p.name].astype(p.dtype) for p in component.inputs})
    for name, value in reference.items():
        assert 0 < relative_error(outputs[name], value) < 0.1, name


def test_nothing_is_compiled_twice(ada_bundle: Path, stage_cache: Path, tmp_path: Path) -> None:
    notes: dict[str, str] = {}
    out = build(
        BuildOptions(target="ada", out=tmp_path / "again", cache_dir=stage_cache),
        lambda stage, done, total, note: notes.update({stage: note}),
    )
    assert set(notes.values()) == {"unchanged", "written"}
    assert "denoiser-plan" in notes
    assert Bundle.open(out).manifest.components == Bundle.open(ada_bundle).manifest.components


def test_what_identifies_a_plan(tmp_path: Path) -> None:
    component = ExportedComponent.read(_write_component(tmp_path / "a", _relu()))
    other = ExportedComponent.read(
        _write_component(tmp_path / "b", [helper.make_node("Sigmoid", ["x"], ["y"])])
    )
    cases = [
        (component, ("8.9",), EngineOptions(), (1, 2, 4)),
        (other, ("8.9",), EngineOptions(), (1, 2, 4)),
        (component, ("8.6", "8.9"), EngineOptions(), (1, 2, 4)),
        (component, ("8.9",), EngineOptions(weight_streaming=True), (1, 2, 4)),
        (component, ("8.9",), EngineOptions(refit=True), (1, 2, 4)),
        (component, ("8.9",), EngineOptions(), (1, 2, 8)),
    ]
    keys = []
    for exported, capabilities, options, bounds in cases + cases:
        stage = load_builder("tensorrt-rtx", capabilities, options).stage(
            exported, {"batch": bounds}
        )
        assert stage is not None
        keys.append(stage.key)
    assert len(set(keys)) == len(cases)
    assert keys[: len(cases)] == keys[len(cases) :]


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [("int8-weight", [("7.5",), ("8.0", "8.6")]), ("int4-weight", [("8.6", "12.0")])],
)
def test_integer_weights_stay_integers(
    precision: str, capabilities: list[tuple[str, ...]], tmp_path: Path
) -> None:
    rules = (Rule("*", "*", "half", ""), Rule("clip_l", "*", precision, ""))
    policy = Policy("mine", "", rules)

    def run(out: Path, progress: Any) -> None:
        options = ExportOptions(clip_tokens=32)
        export_component("clip_l", Checkpoint(checkpoint_path()), policy, options, out)

    folder = run_stage(StageCache(tmp_path), Stage("clip_l", {}, (), run), lambda *_: None)
    component = ExportedComponent.read(folder)
    for i, some in enumerate(capabilities):
        header = read_header(_compile(folder, tmp_path / f"plan{i}", *some))
        assert header.compute_capabilities == some
        assert header.weight_bytes == pytest.approx(component.weight_bytes, rel=0.03)


def test_attention_in_fp32_and_weight_streaming(tmp_path: Path) -> None:
    scales = {name: np.full(1, i + 2, np.float32) for i, name in enumerate("abc")}
    nodes = [helper.make_node("Mul", ["x", name], [f"x{name}"]) for name in scales]
    nodes.append(helper.make_node("Attention", ["xa", "xb", "xc"], ["y"], "attention"))
    folder = _write_component(tmp_path, nodes, dtype=np.float32, weights=scales)
    notes: list[tuple[float, str]] = []
    options = EngineOptions(weight_streaming=True)
    plan = _compile(folder, tmp_path / "plan", "8.9", options=options, notes=notes)
    assert read_header(plan).compute_capabilities == ("8.9",)
    fractions = [fraction for fraction, _ in notes]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert 0.5 < fractions[-1] <= 1


def test_what_does_not_parse_is_shown_with_node_and_reason(tmp_path: Path) -> None:
    nodes = [helper.make_node("Unique", ["x"], ["y"], "my_node")]
    with pytest.raises(Sd35Error, match=r"does not take small: .*my_node") as caught:
        _compile(_write_component(tmp_path, nodes), tmp_path / "plan", "8.9")
    assert "cudaError" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_with_other_ports_than_it_says(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)]
    folder = _write_component(tmp_path, nodes, output=np.float32)
    with pytest.raises(Sd35Error, match=r"reads small's y as float32 .* not float16"):
        _compile(folder, tmp_path / "plan", "8.9")


def test_a_failed_compilation_does_not_stop_the_next(tmp_path: Path) -> None:
    nodes = [helper.make_node("Unique", ["x"], ["y"], "my_node")]
    with pytest.raises(Sd35Error, match="does not take small"):
        _compile(_write_component(tmp_path / "a", nodes), tmp_path / "plan", "8.9")
    plan = _compile(_write_component(tmp_path / "b", _relu()), tmp_path / "plan", "8.9")
    assert read_header(plan).compute_capabilities == ("8.9",)


def test_fp8_is_refused_by_the_compiler_where_there_is_none(tmp_path: Path) -> None:
    scale = {"scale": np.array(0.5, np.float16)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], "quantize", output_dtype=17),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], "dequantize"),
    ]
    folder = _write_component(tmp_path, nodes, weights=scale)
    with pytest.raises(Sd35Error, match=r"cannot compile small for 8\.6: .*fp8_e4m3"):
        _compile(folder, tmp_path / "plan", "8.6")


def test_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "plan"
    out.mkdir()
    (out / "engine.plan").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        _compile(_write_component(tmp_path, _relu()), out, "8.9")


@pytest.mark.nightly
def test_a_killed_build_leaves_no_plan(ada_bundle: Path, stage_cache: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "bundles" / "mini"
    ignore = shutil.ignore_patterns("*-plan", ".tmp-*")
    shutil.copytree(stage_cache, cache, copy_function=os.link, ignore=ignore)
    command = ["build", "--gpu", "ada", "--out", str(out), "--cache-dir", str(cache), "--json"]
    with subprocess.Popen([sys.executable, "-m", "sd35_trt", *command]) as process:
        while not list(cache.glob("denoiser-plan/.tmp-*/*")):
            assert process.poll() is None, "it ended before it compiled the denoiser"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob(f"bundles/**/{MANIFEST}"))
    assert not [p for p in (cache / "denoiser-plan").iterdir() if not p.name.startswith(".")]
    plans = list(cache.glob("clip_l-plan/*/engine.plan"))
    assert [read_header(path).compute_capabilities for path in plans] == [("8.9",)]


def test_without_a_gpu_the_runtime_says_so(
    run,  # type: ignore[no-untyped-def]
    ada_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake(monkeypatch, devices=-1, driver=0)
    with pytest.raises(Sd35Error, match="this machine has no NVIDIA driver"):
        Pipeline.load(ada_bundle)
    with pytest.raises(BundleError, match=r"built for ada by tensorrt-rtx, whose engines do not"):
        Pipeline.load(ada_bundle, device="cpu")
    status, out, err = run("generate", ada_bundle, "a star")
    assert (status, out) == (1, "")
    assert "build --gpu cpu" in one_error_line(err)
    status, out, err = run("verify", ada_bundle, "--against", "half")
    assert (status, out) == (1, "")
    assert "no NVIDIA driver" in one_error_line(err), "and no reference was built"
    status, out, _ = run("inspect", ada_bundle)
    assert status == 0
    assert "ada (sm89), by tensorrt-rtx" in out


def test_options_and_libraries_that_are_not_there(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    cases = {
        ("--gpu", "ada"): (1, "pip install 'sd35-trt[rtx]'"),
        ("--gpu", "hopper", "--builder", "tensorrt"): (1, "pip install 'sd35-trt[tensorrt]'"),
        ("--gpu", "hopper", "--builder", "tensorrt-rtx"): (2, "use tensorrt"),
        ("--gpu", "cpu", "--refit"): (2, "leave out --weight-streaming, --refit"),
        ("--gpu", "cpu", "--optimization-level", 5): (2, "and --optimization-level"),
        ("--gpu", "hopper", "--builder", "tensorrt", "--optimization-level", 6): (2, "0<=x<=5"),
    }
    for arguments, (expected, words) in cases.items():
        status, out, err = run("build", *arguments)
        assert (status, out) == (expected, ""), arguments
        assert words in one_error_line(err)
    assert not list(Path().iterdir())


def test_options_that_the_library_has_not() -> None:
    with pytest.raises(UsageError, match="has no optimization levels"):
        load_builder("tensorrt-rtx", ("8.9",), EngineOptions(optimization_level=4))
    with pytest.raises(UsageError, match="leave out --autotune"):
        load_builder("tensorrt-rtx", ("8.9",), EngineOptions(autotune=True))
    with pytest.raises(UsageError, match="use --optimization-level 5"):
        load_builder("tensorrt", ("9.0",), EngineOptions(autotune=True))


def test_a_gpu_that_the_library_does_not_compile_for() -> None:
    with pytest.raises(UsageError, match=r"does not compile for compute capability 9\.0"):
        load_builder("tensorrt-rtx", ("9.0",))


def test_bounds_hold_what_the_runtime_asks_for() -> None:
    ranges = Ranges((1, 3), (512, 1536), 64, (77, 512))
    defaults = Defaults(28, 4.5, (1024, 768), "euler", 256)
    text = dimension_bounds("t5", ranges, defaults, 77, guided=True)
    assert (text["batch"], text["tokens"]) == ((1, 2, 6), (77, 256, 512))
    step = dimension_bounds("denoiser", ranges, defaults, 77, guided=True)
    assert (step["batch"], step["tokens"]) == ((1, 1, 3), (154, 333, 589))
    assert (step["height"], step["width"]) == ((64, 96, 192), (64, 128, 192))
    conditioner = dimension_bounds("conditioner", ranges, defaults, 77, guided=False)
    assert conditioner["samples"] == (1, 1, 3)
    assert conditioner["steps"] == (1, 28, MAX_STEPS_AT_ONCE)


def test_plans_that_are_no_plans(tmp_path: Path) -> None:
    plan = _compile(_write_component(tmp_path, _relu()), tmp_path / "plan", "8.6", "8.9")
    data = plan.read_bytes()
    assert read_header(plan).compute_capabilities == ("8.6", "8.9")
    for damaged in (b"", data[:50], data[:-1], data + b"x", b"X" + data[1:]):
        plan.write_bytes(damaged)
        with pytest.raises(ValueError, match="plan"):
            read_header(plan)
