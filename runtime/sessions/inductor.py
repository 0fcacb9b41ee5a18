"""Sessions on PyTorch: programs of operators, the step compiled, on our stream and buffers.

The only module of the runtime that imports PyTorch.

On a GPU, a step has to be recordable: :meth:`Device.capture` records the device's stream from
outside PyTorch; see :mod:`sd35_trt.programs.torch_queue`.

The first runs compile, tune and allocate; recorded is what comes after them (see
:class:`sd35_trt.runtime.denoise.DenoiseLoop`). Weights are in PyTorch's own memory.

What is not compiled runs once per picture. Its working memory is many times the step's, and is
taken for the run alone, in one piece: of pieces of many sizes, PyTorch keeps twice as much.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sd35_trt.components import runs_every_step
from sd35_trt.errors import BundleError, OutOfMemory, Sd35Error
from sd35_trt.formats.bundle import Bundle, Component, File, sha256_file
from sd35_trt.formats.program import KERNELS_FILE, TENSORS_FILE, read_program
from sd35_trt.programs.attention import ATTENTION
from sd35_trt.programs.kernel_archive import collect_kernels, offer_kernels
from sd35_trt.programs.streamed_program import StreamedProgram
from sd35_trt.programs.tensors import read_tensors
from sd35_trt.programs.torch_program import TorchProgram
from sd35_trt.programs.torch_queue import HostQueue, TorchQueue, release_memory, shared_queue
from sd35_trt.programs.torch_version import check_version
from sd35_trt.runtime.devices.device import Buffer, Device
from sd35_trt.runtime.kernels import KERNELS, kernel_file

from .failure import engine_failure
from .session import SessionOptions, working_bytes

logger = logging.getLogger("sd35_trt")


class _CudaArray:
    """A buffer as other libraries take it (numba's CUDA array interface, version 3)."""

    def __init__(self, address: int, buffer: Buffer) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(buffer.shape),
            "typestr": np.dtype(buffer.dtype).str,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class InductorSession:
    """One program. See :class:`sd35_trt.runtime.sessions.session.Session`.

    Args:
        mode: how the step is compiled, a key of :data:`sd35_trt.programs.torch_program.MODES`, or
            ``eager``; None takes the bundle's on a GPU, and ``eager`` on the CPU, which is there
            as a reference.

    Raises:
        BundleError: a damaged file.
        OutOfMemory: no room for the weights.
        Sd35Error: a PyTorch that does not run programs.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        device: Device,
        options: SessionOptions,
        mode: str | None = None,
    ) -> None:
        check_version(torch.__version__)
        self._component = component
        self._device = device
        engine_options = bundle.manifest.engine_options
        if device.kind == "cpu":
            self._queue: TorchQueue | HostQueue = HostQueue()
            if options.threads is not None:
                torch.set_num_threads(options.threads)
        else:
            self._queue = shared_queue(device.index, device.stream)
        self.recordable = device.kind == "cuda"
        usual = str(engine_options.get("mode")) if device.kind == "cuda" else "eager"
        self._compiled = runs_every_step(component.name)
        mode = (mode or usual) if self._compiled else "eager"
        self._kernels: Path | None = None
        if device.kind == "cuda" and mode != "eager":
            self._kernels = self._offer_kernels(bundle)
        files = {Path(file.path).name: bundle.path(file.path) for file in component.files}
        try:
            program = read_program(bundle.path(component.files[0].path))
            place, path = self._queue.device, files[TENSORS_FILE]
            names = bundle.manifest.option_names("attention")
            attention = tuple(names) if "attention" in engine_options else tuple(ATTENTION)
            fast = bool(engine_options.get("fast_accumulation", False))
            budget = options.held_bytes
            with self._queue.loading():
                if budget is not None and budget < component.weight_bytes and mode == "eager":
                    self._run: TorchProgram | StreamedProgram = StreamedProgram(
                        program, path, place, budget, attention, fast
                    )
                else:
                    weights = read_tensors(path, program.weights(), place)
                    self._run = TorchProgram(program, weights, place, mode, attention, fast)
        except KeyError as error:
            raise BundleError(
                f"{bundle.root}: {component.name} lacks or misstates {error}",
                "build it again with: sd35-trt build",
            ) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(
                f"{device.name} has no room for {component.name}", "load with a vram_budget"
            ) from error

    def _offer_kernels(self, bundle: Bundle) -> Path | None:
        """Hand over what was compiled before, for this GPU by this PyTorch; see the return value.

        Returns:
            Where to keep what this process compiles; None where there is no folder.
        """
        gpu = torch.cuda.get_device_name(self._queue.device)
        manifest = bundle.manifest
        mode = manifest.engine_options.get("mode")
        cache_file = kernel_file(self._component, gpu, f"{torch.__version__} {mode}")
        if offer := KERNELS.read(cache_file):
            offer_kernels(offer)
        elif (
            manifest.engine_options.get("gpu") == gpu
            and manifest.versions.get("torch") == torch.__version__
        ):
            for file in self._component.files:
                if Path(file.path).name != KERNELS_FILE:
                    continue
                if bundle.trust_kernels:
                    offer_kernels(_checked(bundle, file))
                else:
                    logger.warning(
                        "%s: its compiled kernels are code, and not loaded; they are compiled "
                        "anew — where you trust the bundle, load it with trust_kernels=True "
                        "(--trust-kernels)",
                        bundle.root,
                    )
        return cache_file

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See :class:`sd35_trt.runtime.sessions.session.Session`."""
        name = self._component.name
        dims: dict[str, int] = {}
        for port in self._component.inputs:
            shape = inputs[port.name].shape
            fits = len(shape) == len(port.shape) and all(
                isinstance(want, str) or want == length
                for want, length in zip(port.shape, shape, strict=True)
            )
            if not fits:
                raise Sd35Error(
                    f"{name} refuses {port.name} as {list(shape)}", "try another size or batch"
                )
            dims |= {
                d: size for d, size in zip(port.shape, shape, strict=True) if isinstance(d, str)
            }
        own_bytes = None if self._compiled else working_bytes(self._component, dims)
        try:
            with self._queue.running(own_bytes):
                results = self._run({key: self._tensor(b) for key, b in inputs.items()})
                for key, buffer in outputs.items():
                    self._tensor(buffer).copy_(results[key])
                del results  # before the memory that they are in
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{self._device.name} has no room to run {name}", "try a smaller size or batch"
            ) from error
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise engine_failure(name, f"PyTorch {torch.__version__}", reason) from error

    def _tensor(self, buffer: Buffer) -> torch.Tensor:
        """A tensor on the buffer's memory."""
        if self._device.kind == "cpu":
            array = np.asarray(buffer)
            # PyTorch has no read-only tensors, and warns of such arrays.
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        view = _CudaArray(self._device.pointer(buffer), buffer)
        return torch.as_tensor(view, device=self._queue.device)

    def close(self) -> None:
        """Release the engine's memory, and keep what was compiled for this GPU."""
        try:
            self._device.synchronize()
            if self._kernels is not None and (data := collect_kernels()):
                KERNELS.write(self._kernels, data)
        finally:
            del self._run
            del self._queue
            if self._device.kind == "cuda":
                release_memory()


def _checked(bundle: Bundle, file: File) -> bytes:
    """A file's content, its hash compared: it holds code.

    Raises:
        BundleError: it is damaged.
    """
    path = bundle.path(file.path)
    if sha256_file(path) != file.sha256:
        raise BundleError(
            f"{path} is damaged (SHA-256 differs)", "build it again with: sd35-trt build"
        )
    return path.read_bytes()


def open_session(
    bundle: Bundle, component: Component, device: Device, options: SessionOptions
) -> InductorSession:
    """Load a component of a bundle; see :func:`sd35_trt.runtime.sessions.session.open_session`."""
    return InductorSession(bundle, component, device, options)
