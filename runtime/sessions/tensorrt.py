"""Sessions on plans of TensorRT for RTX and of TensorRT, on our stream and working memory.

Source: the Python API references of TensorRT for RTX and of TensorRT 11
(docs.nvidia.com/deeplearning/tensorrt-rtx and .../tensorrt).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.library import load_library
from sd35_trt.compat.tensorrt import freed_on_error, make_logger
from sd35_trt.components import runs_every_step
from sd35_trt.errors import BundleError, OutOfMemory, Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices.device import Buffer, Device
from sd35_trt.runtime.kernels import KERNELS, kernel_file

from .failure import engine_failure, lacks_memory
from .session import SessionOptions


class TensorRTSession:
    """One plan. See :class:`sd35_trt.runtime.sessions.session.Session`.

    Working memory is the device's scratch memory, sized for the shapes at hand: engines run one
    after another and share it.
    """

    def __init__(
        self, bundle: Bundle, component: Component, device: Device, options: SessionOptions
    ) -> None:
        self._name = component.name
        self._device = device
        self._backend = BACKENDS[component.engine]
        self._trt = trt = load_library(self._backend)
        self._log = make_logger(trt)
        path = bundle.path(component.files[0].path)
        self._runtime = trt.Runtime(self._log)
        self._engine = _deserialize(self._runtime, path)
        if self._engine is None and lacks_memory(self._log.reasons()):
            raise OutOfMemory(
                f"{device.name} has no room for {component.name}", "load with a vram_budget"
            )
        if self._engine is None:
            raise BundleError(
                f"{path} is built for {_built_for(bundle)}; {self._backend.title} "
                f"{trt.__version__} on {_present(device)} refuses it: {self._log.reasons()}",
                "build for this GPU with: sd35-trt build --gpu auto",
            )
        self._limit_weights(options.held_bytes)
        self._cache: Any = None
        self._cache_file = kernel_file(component, _present(device), trt.__version__)
        self._context = self._create_context(is_step=runs_every_step(component.name))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch_bytes = 0
        # The library replaces kernels while it runs and records graphs by itself.
        self.recordable = not self._backend.compiles_late

    def _limit_weights(self, held_bytes: int | None) -> None:
        """Keep so many bytes of weights on the device, or all."""
        streamable = int(self._engine.streamable_weights_size)
        if streamable == 0:  # built without
            return
        if held_bytes is None:
            self._engine.weight_streaming_budget_v2 = streamable
            return
        passing = int(self._engine.weight_streaming_scratch_memory_size)
        self._engine.weight_streaming_budget_v2 = max(0, min(held_bytes - passing, streamable))

    def _create_context(self, is_step: bool) -> Any:
        trt = self._trt
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._backend.compiles_late:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            if is_step:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._cache = config.create_runtime_cache()
            kernels = KERNELS.read(self._cache_file)
            if kernels:
                self._cache.deserialize(kernels)  # False where the GPU or a version changed
            config.set_runtime_cache(self._cache)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(managed)
        if context is None:
            raise OutOfMemory(
                f"{self._backend.title} cannot prepare {self._name}: {self._log.reasons()}",
                "load with a vram_budget",
            )
        return context

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See :class:`sd35_trt.runtime.sessions.session.Session`."""
        context = self._context
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        if shapes != self._shapes:
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self._failure(f"it refuses {name} as {list(shape)}")
            self._scratch_bytes = int(context.update_device_memory_size_for_shapes())
            self._shapes = shapes
        if self._scratch_bytes:
            context.set_device_memory(
                self._device.scratch(self._scratch_bytes), self._scratch_bytes
            )
        for name, buffer in (*inputs.items(), *outputs.items()):
            if not context.set_tensor_address(name, self._device.pointer(buffer)):
                raise self._failure(f"it has no {name}: {self._log.reasons()}")
        if not context.execute_async_v3(self._device.stream):
            raise self._failure(self._log.reasons())

    def _failure(self, reason: str) -> Sd35Error:
        return engine_failure(self._name, self._backend.title, reason)

    def close(self) -> None:
        """Release the engine's memory, and keep the kernels that were finished for this GPU."""
        try:
            self._device.synchronize()
            if self._cache is not None:
                KERNELS.write(self._cache_file, bytes(self._cache.serialize()))
        finally:
            # A context refers to its engine, and that to the runtime.
            del self._context, self._cache
            del self._engine
            del self._runtime


def _deserialize(runtime: Any, path: Path) -> Any:
    """An engine, or None. The file is mapped: its pages are read as the library copies them."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return None
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        return runtime.deserialize_cuda_engine(plan)


def _built_for(bundle: Bundle) -> str:
    manifest = bundle.manifest
    capabilities = manifest.option_names("compute_capabilities") or ["?"]
    version = manifest.versions.get(manifest.builder, "?")
    title = BACKENDS[manifest.builder].title
    return f"compute capability {', '.join(capabilities)} by {title} {version}"


def _present(device: Device) -> str:
    return str(getattr(device, "title", device.name))


@freed_on_error
def open_session(
    bundle: Bundle, component: Component, device: Device, options: SessionOptions
) -> TensorRTSession:
    """Load a component of a bundle; see :func:`sd35_trt.runtime.sessions.session.open_session`."""
    return TensorRTSession(bundle, component, device, options)
