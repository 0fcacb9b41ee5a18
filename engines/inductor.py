"""Engines for PyTorch: the exported program itself, and what its compiler makes of it where the GPU
is at hand.

Without the GPU the first load compiles. Sources: docs.pytorch.org, torch.compile and
torch.compiler.save_cache_artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.requirement import installed_version
from sd35_trt.components import runs_every_step
from sd35_trt.dimensions import Bounds
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.program import KERNELS_FILE, PROGRAM_FILE, TENSORS_FILE, read_program
from sd35_trt.formats.reading import Option
from sd35_trt.programs import flash_attention
from sd35_trt.programs.attention import ATTENTION
from sd35_trt.programs.kernel_archive import collect_kernels
from sd35_trt.programs.tensors import read_tensors
from sd35_trt.programs.torch_program import TorchProgram
from sd35_trt.programs.torch_version import check_version
from sd35_trt.store.stages import Stage, stage_files

from .builder import BuiltEngine, CompiledComponent, EngineOptions, ExportedComponent, link_or_copy

# Dimensions of what a step may be without.
_OPTIONAL = ("rank", "residual_samples", "residual_pixels")


def present_gpu(capabilities: tuple[str, ...]) -> str | None:
    """Name of the first GPU here, where it is one of those built for."""
    if not torch.cuda.is_available():
        return None
    capability = "{}.{}".format(*torch.cuda.get_device_capability(0))
    return torch.cuda.get_device_name(0) if capability in capabilities else None


def compile_kernels(
    component: ExportedComponent,
    bounds: Mapping[str, Bounds],
    mode: str,
    attention: tuple[str, ...],
    fast_accumulation: bool,
    device: str = "cuda:0",
) -> bytes:
    """Run a component at its usual shapes, and where a step has less than it can have, on zeros.

    Returns:
        What the compiler made, for :func:`sd35_trt.programs.kernel_archive.offer_kernels`.

    Raises:
        Sd35Error: it kept nothing.
    """
    program = read_program(component.folder / PROGRAM_FILE)
    place = torch.device(device)
    weights = read_tensors(component.folder / TENSORS_FILE, program.weights(), place)
    run = TorchProgram(program, weights, place, mode, attention, fast_accumulation)
    usual = {dim: bound[1] for dim, bound in bounds.items()}
    least = usual | {dim: bounds[dim][0] for dim in _OPTIONAL if dim in bounds}
    for dims in (usual, least) if least != usual else (usual,):
        run(
            {
                port.name: torch.zeros(
                    port.resolve(**dims), dtype=getattr(torch, port.dtype), device=device
                )
                for port in component.inputs
            }
        )
    kernels = collect_kernels()
    if kernels is None:
        raise Sd35Error(
            f"PyTorch {torch.__version__} kept nothing of {component.name}, which it compiled",
            "build where there is no GPU: its first load compiles",
        )
    return kernels


class InductorBuilder:
    """See :class:`sd35_trt.engines.builder.Builder`.

    Args:
        capabilities: compute capabilities to build for.
    """

    backend = BACKENDS["inductor"]

    def __init__(self, capabilities: tuple[str, ...], options: EngineOptions) -> None:
        self._capabilities = capabilities
        self._mode = "max-autotune" if options.autotune else "default"
        self._gpu = present_gpu(capabilities)

    def versions(self) -> dict[str, str]:
        versions = {"torch": str(torch.__version__)}
        if flash := installed_version(flash_attention.PACKAGE):
            versions[flash_attention.PACKAGE] = flash
        return versions

    def describe(self) -> dict[str, Option]:
        return {
            "compute_capabilities": list(self._capabilities),
            "mode": self._mode,
            "attention": list(ATTENTION),
            "fast_accumulation": True,
            "gpu": self._gpu,
        }

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> Stage | None:
        """See :class:`sd35_trt.engines.builder.Builder`."""
        if self._gpu is None or not runs_every_step(component.name):
            return None
        inputs = {
            "builder": self.versions(),
            "program": stage_files(component.folder)[PROGRAM_FILE].sha256,
            "bounds": bounds,
            **self.describe(),
        }

        def run(out: Path, progress: Callable[[float, str], None]) -> None:
            progress(0.0, "compiling")
            kernels = compile_kernels(component, bounds, self._mode, tuple(ATTENTION), True)
            (out / KERNELS_FILE).write_bytes(kernels)

        return Stage(f"{component.name}-kernels", inputs, (__name__,), run)

    def place(self, engine: CompiledComponent, out: Path) -> BuiltEngine:
        """Put the program, its weights and, where there are any, its kernels into ``out``."""
        files = [PROGRAM_FILE, TENSORS_FILE]
        for name in files:
            link_or_copy(engine.component.folder / name, out / name)
        if (engine.folder / KERNELS_FILE).exists():
            link_or_copy(engine.folder / KERNELS_FILE, out / KERNELS_FILE)
            files.append(KERNELS_FILE)
        return BuiltEngine(tuple(files), engine.component.weight_bytes)


def create(name: str, capabilities: tuple[str, ...], options: EngineOptions) -> InductorBuilder:
    """See :func:`sd35_trt.engines.builder.load_builder`."""
    check_version(torch.__version__)
    if options.weight_streaming or options.refit:
        raise UsageError(
            "PyTorch streams weights without being built for it, and exchanges none",
            "leave out --weight-streaming and --refit",
        )
    if options.optimization_level is not None:
        raise UsageError("PyTorch has no optimization levels", "use --autotune")
    return InductorBuilder(capabilities, options)
