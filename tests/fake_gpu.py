"""Engines of GPUs on the fake CUDA: ONNX Runtime's CPU provider computes when the stream does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, host_array

from sd35_trt.backends import BACKENDS
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices import cuda, cuda_memory, cuda_runtime, cuda_streams
from sd35_trt.runtime.devices.cpu import CpuDevice
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.sessions.onnxruntime import open_session as open_onnx
from sd35_trt.runtime.sessions.session import SessionOptions


def install_fake(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> FakeCuda:
    """The CUDA device of the tests is the fake."""
    fake = FakeCuda(**arguments)
    for module in (cuda, cuda_memory, cuda_runtime, cuda_streams):
        monkeypatch.setattr(module, "cudart", fake)
    monkeypatch.setattr(cuda_streams, "_IDLE", {})
    return fake


class QueuedSession:
    """Computes when the fake's stream does; otherwise an ONNX Runtime session.

    Args:
        weights: bytes of device memory that it takes, as engines do.
    """

    recordable = True

    def __init__(
        self, fake: FakeCuda, bundle: Bundle, component: Component, device: Device
    ) -> None:
        self._fake, self._device = fake, device
        self._component = component
        self._weights = component.weight_bytes
        fake.used += self._weights
        self._inner = open_onnx(bundle, component, CpuDevice(), SessionOptions())

    def run(self, inputs: Any, outputs: Any) -> None:
        for port in self._component.inputs:
            if len(port.shape) != len(inputs[port.name].shape):
                raise Sd35Error(f"{self._component.name} failed on {port.name}", "no")

        def arrays(buffers: Any) -> dict[str, np.ndarray]:
            return {
                name: host_array(self._device.pointer(b), b.shape, b.dtype)
                for name, b in buffers.items()
            }

        feed, result = arrays(inputs), arrays(outputs)
        self._fake.launch(self._device.stream, lambda: self._inner.run(feed, result))

    def close(self) -> None:
        self._device.synchronize()
        self._fake.used -= self._weights
        self._inner.close()


class FakeTensorRT(ModuleType):
    """What :mod:`sd35_trt.runtime.sessions.tensorrt` calls of TensorRT.

    A plan stands for the ONNX component of ``twin`` with the same name. Each engine works in the
    memory that it is given, and overwrites all of it.

    Attributes:
        kernels: what the runtime cache holds after a run.
        loaded: caches that were handed over, in order.
        strategies: CUDA graph strategy of each context, in order.
        budgets: weight streaming budgets that were set.
        refuses: what the library says of every plan, if anything.
        streamable: bytes of weights that may be streamed.
    """

    __version__ = "1.7.1"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    CudaGraphStrategy = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)

    class ILogger:
        ERROR = 1

    def __init__(self, name: str, fake: FakeCuda, bundle: Path, twin: Path) -> None:
        super().__init__(BACKENDS[name].module)
        self.fake = fake
        self.twin = Bundle.open(twin)
        self.plans = {}
        opened = Bundle.open(bundle)
        for component in opened.manifest.components:
            data = opened.path(component.files[0].path).read_bytes()
            self.plans[hashlib.sha256(data).hexdigest()] = component
        self.kernels = b"kernels"
        self.loaded: list[bytes] = []
        self.strategies: list[int] = []
        self.budgets: list[int] = []
        self.refuses: str | None = None
        self.streamable = 0
        self.scratch = 4096

    def Runtime(self, log: Any) -> Any:
        def deserialize(plan: Any) -> Any:
            found = self.plans.get(hashlib.sha256(plan).hexdigest())
            if self.refuses is None and found is not None:
                return _Engine(self, found)
            log.log(self.ILogger.ERROR, self.refuses or "the plan is damaged")
            return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class _Engine:
    weight_streaming_scratch_memory_size = 100

    def __init__(self, library: FakeTensorRT, component: Component) -> None:
        self.library, self.component = library, component
        self.streamable_weights_size = library.streamable
        self.bytes = component.weight_bytes
        library.fake.used += self.bytes

    def __del__(self) -> None:
        self.library.fake.used -= self.bytes

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight_streaming_budget_v2":
            self.library.budgets.append(value)
        object.__setattr__(self, name, value)

    def create_runtime_config(self) -> Any:
        def create_cache() -> Any:
            def load(data: bytes) -> bool:
                self.library.loaded.append(data)
                return True

            return SimpleNamespace(deserialize=load, serialize=lambda: self.library.kernels)

        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            cuda_graph_strategy=0,
            create_runtime_cache=create_cache,
            set_runtime_cache=lambda cache: True,
        )

    def create_execution_context(self, config: Any) -> _Context:
        self.library.strategies.append(getattr(config, "cuda_graph_strategy", 0))
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._library = engine, engine.library
        twin = self._library.twin
        component = twin.manifest.component(engine.component.name)
        assert component is not None
        self._ports = component
        self._inner = open_onnx(twin, component, CpuDevice(), SessionOptions())
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        port = next((p for p in self._ports.inputs if p.name == name), None)
        if port is None or len(port.shape) != len(shape):
            return False
        self._shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return self._library.scratch * max(shape[0] for shape in self._shapes.values())

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 8 == 0
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self._memory[1] >= self.update_device_memory_size_for_shapes()
        dims: dict[str, int] = {}
        for port in self._ports.inputs:
            dims.update(
                (d, n)
                for d, n in zip(port.shape, self._shapes[port.name], strict=True)
                if isinstance(d, str)
            )
        dims.setdefault("image_height", 8 * dims.get("height", 0))
        dims.setdefault("image_width", 8 * dims.get("width", 0))
        dims.setdefault("height", dims["image_height"] // 8)
        dims.setdefault("width", dims["image_width"] // 8)
        feed = {
            p.name: host_array(self._addresses[p.name], self._shapes[p.name], p.dtype)
            for p in self._ports.inputs
        }
        outputs = {
            p.name: host_array(self._addresses[p.name], p.resolve(**dims), p.dtype)
            for p in self._ports.outputs
        }
        memory = host_array(*(self._memory[0], (self._memory[1],), np.uint8))

        def work() -> None:
            memory[:] = 0xFF
            self._inner.run(feed, outputs)

        self._library.fake.launch(stream, work)
        return True
