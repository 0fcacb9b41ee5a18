"""The kinds of engine, one row each: what makes them, what runs them, and what they can.

To add one, add a row here and the two modules that it names. Nothing else asks which kind an engine
is: it reads the row. Which kind a GPU family prefers stands with the family, in ``gpus.toml``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .components import runs_every_step


@dataclass(frozen=True)
class Companion:
    """A package that makes engines faster on some GPUs.

    Attributes:
        package: as it is installed.
        extra: of this package, that installs it.
        compute_capabilities: of the GPUs that it makes faster.
    """

    package: str
    extra: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Backend:
    """One kind of engine.

    Attributes:
        name: as ``--builder`` and the manifest have it.
        title: its library's name in messages.
        module: what is imported of the library.
        packages: that may hold the library, as they are installed.
        extra: of this package, that installs it.
        dialects: the library's minimum version → what the exporter writes for it, a key of
            :data:`sd35_trt.dialects.DIALECTS`; from the oldest on.
        files: what an engine consists of, the one that is opened first.
        builder: ``module:function``, see :func:`sd35_trt.engines.builder.load_builder`.
        session: ``module:function``, see :func:`sd35_trt.runtime.sessions.session.open_session`.
        compute_capabilities: CUDA compute capabilities that it compiles for; none where engines
            are not compiled for a GPU.
        devices: kinds of device that engines run on, the usual one first.
        contents: ``module:function``, see :func:`sd35_trt.quality.contents.look_inside`; None
            where engines cannot be looked into.
        marked_runs: ``module:function``, see :func:`sd35_trt.quality.marked_graphs.engine_runs`;
            None where engines are not compiled from ONNX.
        crosses: whether it compiles for GPUs that are not there, and several in one engine.
        needs_library: whether building takes the library; otherwise engines are the exported files.
        compiles_late: whether kernels are finished on the GPU: the library then has a cache of
            them, and records its own graphs, as they may be replaced while it runs.
        compiles_apart: whether it compiles in a process of its own, so that several may at once.
        times_kernels: whether it chooses kernels by running them on the GPU: it then has
            optimization levels, and its timings are kept.
        levels: optimization level of components where no other is asked for; the library's own for
            those that are left out.
        reports_memory: whether the compiler says how much working memory an engine takes.
        streams: whether weights may be streamed from the host's memory: ``never``, ``asked``
            (where the bundle was built for it), ``always`` (all but what runs in every step).
        keeps_activations: components whose working memory stays theirs when they have run: none,
            the ``denoiser``, or all that run in every ``step``.
        least_rank: of the matrices of adapters, in runs whose images have none: 0 where engines
            have graphs without adapters, else 1.
        context_bytes: device memory that a process takes beside its engines.
        workspace_bytes: of every engine, beside its tensors.
        allocation: how tensors are allocated, for an estimate of working memory: ``live`` (as many
            bytes as are alive at once), ``cudnn`` (and the copies that cuDNN, and TensorRT, make of
            what a convolution reads), ``arena`` (in ONNX Runtime's).
        otherwise: the kind that takes its place where its library is not installed.
        cuda: ``module:attribute`` that is None where the library was built without CUDA.
        companions: packages that make it faster.
    """

    name: str
    title: str
    module: str
    packages: tuple[str, ...]
    extra: str
    dialects: Mapping[str, str] = field(hash=False)
    files: tuple[str, ...]
    builder: str
    session: str
    compute_capabilities: tuple[str, ...]
    devices: tuple[str, ...]
    contents: str | None = None
    marked_runs: str | None = None
    crosses: bool = False
    needs_library: bool = True
    compiles_late: bool = False
    compiles_apart: bool = False
    times_kernels: bool = False
    levels: Mapping[str, int] = field(default_factory=dict, hash=False)
    reports_memory: bool = False
    streams: Literal["never", "asked", "always"] = "never"
    keeps_activations: Literal["", "denoiser", "step"] = ""
    least_rank: int = 1
    context_bytes: int = 400_000_000
    workspace_bytes: int = 0
    allocation: Literal["live", "cudnn", "arena"] = "live"
    otherwise: str | None = None
    cuda: str | None = None
    companions: tuple[Companion, ...] = ()

    @property
    def minimum_version(self) -> str:
        """The oldest version of the library that works."""
        return next(iter(self.dialects))

    def dialect(self, version: str | None = None) -> str:
        """What the exporter writes for a version of the library; None is the newest."""
        fitting = [
            name
            for minimum, name in self.dialects.items()
            if version is None or version_numbers(version) >= version_numbers(minimum)
        ]
        return fitting[-1] if fitting else next(iter(self.dialects.values()))

    def can_stream(self, component: str) -> bool:
        """Whether an engine can be made that streams its weights."""
        return self.streams == "asked" or (
            self.streams == "always" and not runs_every_step(component)
        )

    def keeps(self, component: str) -> bool:
        """Whether a component's working memory stays its own when it has run."""
        if self.keeps_activations == "step":
            return runs_every_step(component)
        return component == self.keeps_activations


_ROWS = (
    Backend(
        name="onnxruntime",
        title="ONNX Runtime",
        module="onnxruntime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        extra="onnxruntime",
        # Older ones read external data from anywhere that a file names.
        dialects={"1.24.2": "opset23"},
        files=("model.onnx", "weights.data"),
        builder="sd35_trt.engines.onnxruntime:create",
        session="sd35_trt.runtime.sessions.onnxruntime:open_session",
        compute_capabilities=(),
        devices=("cpu", "cuda"),
        contents="sd35_trt.quality.graph_contents:look_inside",
        marked_runs="sd35_trt.quality.marked_graphs:onnxruntime_runs",
        needs_library=False,
        # On a GPU it gives back that of engines that run once per picture.
        keeps_activations="denoiser",
        allocation="arena",
    ),
    # The members of TensorRT for RTX 1.7's ComputeCapability enum.
    Backend(
        name="tensorrt-rtx",
        title="TensorRT for RTX",
        module="tensorrt_rtx",
        packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        extra="rtx",
        dialects={"1.7": "opset23"},
        files=("engine.plan",),
        builder="sd35_trt.engines.tensorrt:create",
        session="sd35_trt.runtime.sessions.tensorrt:open_session",
        compute_capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        devices=("cuda",),
        contents="sd35_trt.quality.plan_contents:look_inside",
        marked_runs="sd35_trt.quality.polygraphy_runs:tensorrt_runs",
        crosses=True,
        compiles_late=True,
        compiles_apart=True,
        reports_memory=True,
        streams="asked",
        # What it reports for mini's engines is this and the sum of live tensors, within 15 % (less
        # for T5, whose attention it fuses).
        workspace_bytes=8 << 20,
    ),
    Backend(
        name="tensorrt",
        title="TensorRT",
        module="tensorrt",
        packages=("tensorrt-cu13", "tensorrt-cu12"),
        extra="tensorrt",
        dialects={"10.6": "opset21", "10.15": "opset23"},
        files=("engine.plan",),
        builder="sd35_trt.engines.tensorrt:create",
        session="sd35_trt.runtime.sessions.tensorrt:open_session",
        compute_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
        devices=("cuda",),
        contents="sd35_trt.quality.plan_contents:look_inside",
        marked_runs="sd35_trt.quality.polygraphy_runs:tensorrt_runs",
        compiles_apart=True,
        times_kernels=True,
        # They run once a picture. Version 10.6 compiles them in a fraction of the time then, and on
        # an H100 they run no slower.
        levels={"clip_l": 1, "clip_g": 1, "vae_encoder": 1, "vae_decoder": 1},
        reports_memory=True,
        streams="asked",
        # Version 10.6 on an H100: what NVML shows beyond the engines' bytes is 0.80 GB with Medium,
        # 0.92 GB with Large.
        context_bytes=900_000_000,
        workspace_bytes=8 << 20,
        # Of Medium's autoencoder at 1024×1024, version 10.6 reports 2.52 GB; this says 2.56.
        allocation="cudnn",
        otherwise="inductor",
    ),
    Backend(
        name="inductor",
        title="PyTorch",
        module="torch",
        packages=("torch",),
        extra="inductor",
        dialects={"2.9": "program"},
        files=("program.json", "weights.safetensors"),
        builder="sd35_trt.engines.inductor:create",
        session="sd35_trt.runtime.sessions.inductor:open_session",
        compute_capabilities=("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
        devices=("cuda", "cpu"),
        contents="sd35_trt.quality.program_contents:look_inside",
        streams="always",
        # A recorded graph of PyTorch has its own.
        keeps_activations="step",
        least_rank=0,
        # 0.83 GB on an H100 with version 2.11, and some room.
        context_bytes=900_000_000,
        allocation="cudnn",
        cuda="torch.version:cuda",
        companions=(
            Companion("triton", "inductor", ()),
            Companion("flash-attn-4", "hopper", ("9.0",)),
        ),
    ),
)


def version_numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: (10, 6, 0) of ``10.6.0``."""
    return tuple(map(int, re.findall(r"\d+", version)))


#: Every kind by name.
BACKENDS: dict[str, Backend] = {row.name: row for row in _ROWS}


def resolve(dotted: str) -> Any:
    """What ``module:attribute`` names; the module is imported."""
    module, _, attribute = dotted.partition(":")
    return getattr(importlib.import_module(module), attribute)
