"""Sessions: one suite over every kind that can be had here; GPUs are a fake where there is none.

The fake computes with ONNX Runtime, when the stream gets to it: what the suite tests without a GPU
is what a session asks of a device and of a library, and in which order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import alone_on_a_gpu, relative_error
from fake_cuda import FakeCuda
from fake_gpu import FakeTensorRT, QueuedSession, install_fake
from models.make import make

from sd35_trt.errors import BundleError, OutOfMemory, Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices.cpu import CpuDevice
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.devices.opening import open_device
from sd35_trt.runtime.sessions import onnxruntime as onnxruntime_session
from sd35_trt.runtime.sessions import tensorrt as tensorrt_session
from sd35_trt.runtime.sessions.session import (
    Session,
    SessionOptions,
    can_stream,
    check_engines,
    device_of,
    open_session,
)

KINDS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-rtx-cuda", "queued-fake",
         "tensorrt-rtx-fake", "inductor-cpu", "inductor-cuda")  # fmt: skip

# Of what is not the reference's own library on its own device. FP8 on a GPU rounds other values up
# than on the CPU: as much as FP8 is off in either. Of 8 seeds, tiny networks on the CPU are off by
# 6e-7 at most, by any number of threads.
TOLERANCES = {"onnxruntime-cuda": 0.05, "inductor-cpu": 4e-6, "inductor-cuda": 0.02}


@dataclass
class Stand:
    """A bundle on a device.

    Attributes:
        reference: a bundle of the same graphs that runs on the CPU.
        tolerance: relative, of what it computes; 0 where the same library computes.
    """

    bundle: Bundle
    reference: Bundle
    device: Device
    open: Callable[..., Session]
    fake: FakeCuda | None
    tolerance: float

    def session(self, name: str, **options: Any) -> Session:
        component = self.bundle.manifest.component(name)
        assert component is not None
        return self.open(self.bundle, component, self.device, SessionOptions(**options))


@pytest.fixture(scope="module")
def tiny_plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans that stand for the graphs of ``tiny_bundle``."""
    folder = tmp_path_factory.mktemp("plans")
    return make(folder / "bundle", folder / "stages", "ada")


# Of a kind on a device, the bundle and that of its reference; tiny networks for what is not there.
# Programs for a GPU are in FP32, where other arithmetic makes no difference.
_BUNDLES = {
    "onnxruntime-cuda": ("fp8_bundle", "fp8_bundle"),
    "tensorrt-rtx-cuda": ("ada_bundle", "fp8_bundle"),
    "tensorrt-rtx-fake": ("tiny_plans", "tiny_bundle"),
    "inductor-cpu": ("tiny_programs", "tiny_bundle"),
    "inductor-cuda": ("hopper_bundle", "mini_bundle"),
}


@pytest.fixture(scope="module")
def fp8_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(policy="fp8")


@pytest.fixture(scope="module")
def ada_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(target="ada")


@pytest.fixture(scope="module")
def hopper_bundle(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(target="hopper", builder="inductor", policy="fp32")


def _check_library(kind: str, device: Device) -> None:
    """Refuse a machine that has a GPU but not the library, or another GPU than a plan's."""
    if kind == "onnxruntime":
        onnxruntime_session._providers(device)
    if kind == "tensorrt-rtx" and getattr(device, "compute_capability", "") != "8.9":
        raise Sd35Error("plans are for Ada", "run this there")


@pytest.fixture(params=KINDS)
def stand(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Stand]:
    monkeypatch.setenv("SD35_TRT_CACHE", str(tmp_path / "cache"))
    kind, _, where = request.param.rpartition("-")
    fake = install_fake(monkeypatch) if where == "fake" else None
    try:
        device = open_device("cpu" if where == "cpu" else "cuda")
        if where == "cuda":
            _check_library(kind, device)
    except Sd35Error as error:
        pytest.skip(str(error))
    bundle, reference = (
        Bundle.open(request.getfixturevalue(name))
        for name in _BUNDLES.get(request.param, ("tiny_bundle", "tiny_bundle"))
    )
    opener: Callable[..., Session] = open_session
    if fake is not None and kind == "queued":
        opener = lambda b, c, device, options: QueuedSession(fake, b, c, device)  # noqa: E731
    elif fake is not None:
        library = FakeTensorRT(kind, fake, bundle.root, reference.root)
        monkeypatch.setattr(tensorrt_session, "load_library", lambda flavour: library)
    tolerance = TOLERANCES.get(request.param, 0.0)
    yield Stand(bundle, reference, device, opener, fake, tolerance)
    device.close()
    gc.collect()
    assert fake is None or fake.used == 0


def feeds(component: Component, seed: int, **dims: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def value(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        if dtype.kind in "iu":
            return rng.integers(0, 200, shape).astype(dtype)
        if name == "timesteps":
            return np.linspace(1000, 10, shape[0]).astype(dtype)
        return rng.standard_normal(shape).astype(dtype) * (0.1 if name == "modulation" else 1)

    return {p.name: value(p.name, p.resolve(**dims), np.dtype(p.dtype)) for p in component.inputs}


def run(session: Session, device: Device, component: Component, feed: Any, **dims: int) -> Any:
    """What a session computes into memory that held NaN, or 255."""
    buffers = {name: device.upload(array) for name, array in feed.items()}
    outputs = {}
    for port in component.outputs:
        poison = np.full(port.resolve(**dims), 0, port.dtype)
        poison.reshape(-1).view(np.uint8)[:] = 0xFF
        outputs[port.name] = device.upload(poison)
    session.run(buffers, outputs)
    result = {name: device.download(buffer).copy() for name, buffer in outputs.items()}
    for name, array in feed.items():
        np.testing.assert_array_equal(device.download(buffers[name]), array, name)
    return result


def expected(stand: Stand, name: str, feed: Any, **dims: int) -> Any:
    component = stand.reference.manifest.component(name)
    assert component is not None
    device = CpuDevice()
    session = open_session(stand.reference, component, device)
    return run(session, device, component, feed, **dims)


def check(stand: Stand, session: Session, name: str, seed: int = 0, **dims: int) -> None:
    component = stand.bundle.manifest.component(name)
    assert component is not None
    feed = feeds(component, seed, **dims)
    actual = run(session, stand.device, component, feed, **dims)
    for key, value in expected(stand, name, feed, **dims).items():
        assert actual[key].shape == value.shape
        if value.dtype == np.uint8 and stand.device.kind == "cpu":
            # Between two steps, a value may be rounded the other way.
            assert np.abs(actual[key].astype(int) - value).max() <= (stand.tolerance > 0)
        else:
            assert relative_error(actual[key], value) <= stand.tolerance, (name, key)


SHAPES: dict[str, list[dict[str, int]]] = {
    "clip_l": [{"batch": 1}, {"batch": 3}],
    "t5": [{"batch": 2, "tokens": 32}],
    "conditioner": [{"samples": 2, "tokens": 109, "steps": 4}],
    "denoiser": [
        {"batch": 1, "tokens": 109, "height": 16, "width": 16},
        {"batch": 2, "tokens": 109, "height": 8, "width": 24},
        {"batch": 1, "tokens": 109, "height": 16, "width": 16},
    ],
    "vae_decoder": [{"batch": 1, "height": 8, "width": 16, "image_height": 64, "image_width": 128}],
    "vae_encoder": [{"batch": 2, "height": 16, "width": 8, "image_height": 128, "image_width": 64}],
}


@pytest.mark.parametrize("name", SHAPES)
def test_it_computes_the_component(stand: Stand, name: str) -> None:
    component = stand.bundle.manifest.component(name)
    assert component is not None
    tokens = component.bounds.get("tokens", (0, 0))[1]
    session = stand.session(name)
    for seed, dims in enumerate(SHAPES[name]):
        if "tokens" in dims:
            dims = {**dims, "tokens": tokens}
        check(stand, session, name, seed, **dims)
    session.close()


def test_engines_take_turns(stand: Stand) -> None:
    """They may share working memory, which each may leave in any state."""
    names = ("clip_l", "vae_decoder")
    sessions = {name: stand.session(name) for name in names}
    for seed in range(2):
        for name in names:
            check(stand, sessions[name], name, seed, **SHAPES[name][0])
    for session in sessions.values():
        session.close()


def test_closing_gives_the_memory_back(stand: Stand) -> None:
    if stand.device.kind == "cpu":
        pytest.skip("the CPU's allocator keeps what was freed")
    if stand.fake is None:
        alone_on_a_gpu()
    check(stand, (first := stand.session("clip_l")), "clip_l", **SHAPES["clip_l"][1])
    first.close()
    del first
    gc.collect()
    before = stand.device.memory().used
    for _ in range(3):
        session = stand.session("clip_l")
        check(stand, session, "clip_l", **SHAPES["clip_l"][1])
        session.close()
        del session
    gc.collect()
    assert stand.device.memory().used - before <= 1 << 20


def test_it_closes_while_its_work_is_queued(stand: Stand) -> None:
    component = stand.bundle.manifest.component("clip_l")
    assert component is not None
    feed = feeds(component, 0, batch=3)
    for _ in range(5):
        session = stand.session("clip_l")
        buffers = {name: stand.device.upload(array) for name, array in feed.items()}
        outputs = {p.name: stand.device.empty(p.resolve(batch=3), p.dtype) for p in
                   component.outputs}  # fmt: skip
        for _ in range(3):
            session.run(buffers, outputs)
        session.close()
        actual = {name: stand.device.download(buffer) for name, buffer in outputs.items()}
        for key, value in expected(stand, "clip_l", feed, batch=3).items():
            assert relative_error(actual[key], value) <= stand.tolerance


def test_what_it_does_not_take_is_refused_in_one_line(stand: Stand) -> None:
    component = stand.bundle.manifest.component("clip_l")
    assert component is not None
    session = stand.session("clip_l")
    device = stand.device
    ids = device.upload(np.zeros((1, 2, 77), np.int64))
    outputs = {
        p.name: device.empty(p.resolve(batch=1), np.dtype(p.dtype)) for p in component.outputs
    }
    with pytest.raises(Sd35Error, match=r"clip_l .*input_ids|clip_l failed") as caught:
        session.run({"input_ids": ids}, outputs)
    assert "\n" not in str(caught.value)
    check(stand, session, "clip_l", **SHAPES["clip_l"][0])
    session.close()


# TensorRT's sessions beyond the suite, on the fake.


@pytest.fixture
def rtx(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tiny_plans: Path, tmp_path: Path
) -> Iterator[tuple[FakeTensorRT, Stand]]:
    monkeypatch.setenv("SD35_TRT_CACHE", str(tmp_path / "cache"))
    fake = install_fake(monkeypatch)
    library = FakeTensorRT("tensorrt-rtx", fake, tiny_plans, tiny_bundle)
    monkeypatch.setattr(tensorrt_session, "load_library", lambda flavour: library)
    device = open_device("cuda")
    bundle = Bundle.open(tiny_plans)
    yield library, Stand(bundle, Bundle.open(tiny_bundle), device, open_session, fake, 0.0)
    device.close()


def test_a_plan_for_another_gpu(rtx: tuple[FakeTensorRT, Stand]) -> None:
    library, stand = rtx
    library.refuses = "The engine does not support compute capability 9.0"
    with pytest.raises(BundleError) as caught:
        stand.session("clip_l")
    text = str(caught.value)
    for part in (
        "clip_l/engine.plan is built for compute capability 8.9 by TensorRT for RTX 1.7",
        "TensorRT for RTX 1.7.1 on Fake GPU (9.0) refuses it",
        "does not support compute capability 9.0",
        "sd35-trt build --gpu auto",
    ):
        assert part in text
    assert stand.fake is not None
    assert stand.device.memory().used < 32 << 20


def test_a_damaged_plan(rtx: tuple[FakeTensorRT, Stand], tmp_path: Path) -> None:
    library, stand = rtx
    library.plans.clear()
    with pytest.raises(BundleError, match="refuses it: the plan is damaged"):
        stand.session("clip_l")


def test_no_memory_for_a_plan(rtx: tuple[FakeTensorRT, Stand]) -> None:
    library, stand = rtx
    library.refuses = "Cuda Runtime (out of memory)"
    with pytest.raises(OutOfMemory, match="no room for clip_l — load with a vram_budget"):
        stand.session("clip_l")


def test_finished_kernels_are_kept(rtx: tuple[FakeTensorRT, Stand], tmp_path: Path) -> None:
    library, stand = rtx
    stand.session("clip_l").close()
    stand.session("clip_l").close()
    stand.session("clip_g").close()
    assert library.loaded == [b"kernels"], "by plan, and once they were written"
    files = list((tmp_path / "cache" / "kernels").iterdir())
    assert len(files) == 2
    assert {file.suffix for file in files} == {".bin"}


def test_kernels_that_cannot_be_kept_are_no_error(
    rtx: tuple[FakeTensorRT, Stand], tmp_path: Path
) -> None:
    _, stand = rtx
    (tmp_path / "cache").write_text("a file where the folder should be")
    session = stand.session("clip_l")
    check(stand, session, "clip_l", **SHAPES["clip_l"][0])
    session.close()


def test_only_the_step_is_recorded_by_the_library(rtx: tuple[FakeTensorRT, Stand]) -> None:
    library, stand = rtx
    sessions = [stand.session(name) for name in ("clip_l", "denoiser")]
    assert library.strategies == [0, 1]
    assert not any(session.recordable for session in sessions)
    for session in sessions:
        session.close()


def test_weights_that_stream_get_what_is_left(rtx: tuple[FakeTensorRT, Stand]) -> None:
    library, stand = rtx
    stand.session("clip_l", held_bytes=500).close()
    assert library.budgets == [], "built without"
    library.streamable = 10_000
    for held in (None, 4_100, 50, 100_000):
        stand.session("clip_l", held_bytes=held).close()
    assert library.budgets == [10_000, 4_000, 0, 10_000]


def test_a_bundle_says_where_it_runs(tiny_bundle: Path, tiny_plans: Path) -> None:
    onnx, plan = Bundle.open(tiny_bundle), Bundle.open(tiny_plans)
    assert (device_of(onnx), device_of(onnx, "cuda:1"), device_of(plan)) == (
        "cpu",
        "cuda:1",
        "cuda",
    )
    with pytest.raises(BundleError, match=r"do not run on cpu — use cuda, or build with: .* cpu"):
        device_of(plan, "cpu")
    check_engines(plan)
    (component, *_) = plan.manifest.components
    assert not can_stream(plan, component)


@pytest.mark.parametrize(
    ("device", "name", "shrinks"),
    [("cuda", "vae_decoder", True), ("cuda", "denoiser", False), ("cpu", "vae_decoder", False)],
)
def test_onnxruntime_gives_memory_back_on_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, name: str, shrinks: bool
) -> None:
    install_fake(monkeypatch)
    opened = open_device(device)
    options = onnxruntime_session._run_options(opened, name)
    key = "memory.enable_memory_arena_shrinkage"
    if shrinks:
        assert options.get_run_config_entry(key) == "gpu:0"
    else:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_run_config_entry(key)
    opened.close()
