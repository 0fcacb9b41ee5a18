"""Engines for NVIDIA GPUs: plans of TensorRT for RTX and of TensorRT.

Both have one API; what differs is in :mod:`sd35_trt.compat.tensorrt`. Networks are strongly
typed: the precision of everything is what the exporter wrote. Sources: the Python API references of
TensorRT for RTX and of TensorRT 11 (docs.nvidia.com/deeplearning/tensorrt-rtx and .../tensorrt).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sd35_trt.backends import BACKENDS, Backend
from sd35_trt.compat.library import load_library
from sd35_trt.compat.tensorrt import (
    freed_on_error,
    make_logger,
    without_noise,
)
from sd35_trt.dimensions import Bounds
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.component import MODEL_FILE, WEIGHTS_FILE
from sd35_trt.formats.reading import Option
from sd35_trt.store.stages import Stage, stage_files

from .builder import (
    BuiltEngine,
    Engine,
    EngineOptions,
    ExportedComponent,
    link_or_copy,
)
from .tensorrt_plan import read_header

_FACTS_FILE = "engine.json"


# Bytes of weights in a plan may differ from the exported ones by alignment and folded constants.
_TOLERANCE, _SLACK = 0.03, 1 << 20

_MEMORY_LINE = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


def create(name: str, capabilities: tuple[str, ...], options: EngineOptions) -> TensorRTBuilder:
    """See :func:`sd35_trt.engines.builder.load_builder`."""
    if options.autotune:
        raise UsageError("TensorRT tries kernels as it is", "leave out --autotune")
    backend = BACKENDS[name]
    return TensorRTBuilder(backend, load_library(backend), capabilities, options)


class TensorRTBuilder:
    """See :class:`sd35_trt.engines.builder.Builder`.

    Args:
        backend: the row of the library.
        library: the imported package, whose names the TensorRT API documents.
        capabilities: compute capabilities to compile for.

    Raises:
        UsageError: the library cannot compile for them.
    """

    def __init__(
        self, backend: Backend, library: Any, capabilities: tuple[str, ...], options: EngineOptions
    ) -> None:
        self.backend = backend
        self._trt = library
        self._capabilities = capabilities
        self._options = options
        if self.backend.crosses:
            for capability in capabilities:
                if not hasattr(library.ComputeCapability, _sm(capability)):
                    raise UsageError(
                        f"{self._title} does not compile for compute capability {capability}",
                        "see: sd35-trt gpus",
                    )

    @property
    def _title(self) -> str:
        return f"{self.backend.title} {self._trt.__version__}"

    def versions(self) -> dict[str, str]:
        return {self.backend.name: str(self._trt.__version__)}

    def describe(self) -> dict[str, Option]:
        return {
            "compute_capabilities": list(self._capabilities),
            "weight_streaming": self._options.weight_streaming,
            "refit": self._options.refit,
        }

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> Stage:
        """See :class:`sd35_trt.engines.builder.Builder`."""
        files = stage_files(component.folder)
        inputs = {
            "builder": self.versions(),
            "files": {name: files[name].sha256 for name in (MODEL_FILE, WEIGHTS_FILE)},
            "bounds": bounds,
            **self.describe(),
        }

        def run(out: Path, progress: Callable[[float, str], None]) -> None:
            self._compile(component, bounds, out, progress)

        return Stage(f"{component.name}-plan", inputs, (__name__,), run)

    def place(self, engine: Engine, out: Path) -> BuiltEngine:
        """Link the plan into ``out``, or copy it where links do not reach."""
        (plan,) = self.backend.files
        link_or_copy(engine.folder / plan, out / plan)
        facts = json.loads((engine.folder / _FACTS_FILE).read_text("utf-8"))
        return BuiltEngine((plan,), facts["weight_bytes"], facts["activation_bytes"])

    def working_memory(
        self,
        component: ExportedComponent,
        bounds: Mapping[str, Bounds],
        out: Path,
        progress: Callable[[float, str], None],
    ) -> int:
        """Bytes of working memory at the largest shapes, by compiling the component.

        Args:
            out: an existing directory for the plan.

        Raises:
            Sd35Error: it does not compile, or the library reports no such figure.
        """
        self._compile(component, bounds, out, progress)
        found = json.loads((out / _FACTS_FILE).read_text("utf-8"))["activation_bytes"]
        if found is None:
            raise Sd35Error(f"{self._title} reports no working memory", "leave out --exact")
        return int(found)

    @freed_on_error
    def _compile(
        self,
        component: ExportedComponent,
        bounds: Mapping[str, Bounds],
        out: Path,
        progress: Callable[[float, str], None],
    ) -> None:
        """Write the plan and what the builder said about it.

        Raises:
            Sd35Error: a node that the library does not take, or no plan; with its reasons.
            OSError: the disk is full or not writable.
        """
        trt = self._trt
        progress(0.0, "parsing")
        log = make_logger(trt)
        memory: dict[str, int] = {}

        def note(message: str) -> None:
            if found := _MEMORY_LINE.search(message):
                memory[found[1]] = int(found[2])

        log.on_message = note
        builder = trt.Builder(log)
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        flags = 0 if strongly_typed is None else 1 << int(strongly_typed)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(component.folder / MODEL_FILE)):
            raise Sd35Error(
                f"{self._title} does not take {component.name}: {_parser_errors(parser)}",
                "report this with the command",
            )
        self._check_ports(component, network)
        for attention in _attentions(trt, network):
            # FP32 has no fused kernel; where there is one, it is taken.
            attention.decomposable = True
        config = builder.create_builder_config()
        self._configure(config)
        config.add_optimization_profile(_profile(builder, component, bounds))
        monitor = _progress_monitor(trt, progress)  # the configuration does not keep it alive
        config.progress_monitor = monitor
        with (out / self.backend.files[0]).open("wb") as stream:
            writer = _stream_writer(trt, stream)
            built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        if not built or not writer.bytes:
            raise Sd35Error(
                f"{self._title} cannot compile {component.name} for "
                f"{', '.join(self._capabilities)}: {log.reasons()}",
                "build on the GPU itself, or leave out --refit"
                if self._options.refit
                else "try another --policy, or report this with the command",
            )
        weight_bytes = memory.get("Weights", component.weight_bytes)
        if self.backend.crosses:
            weight_bytes = self._read_back(component, out / self.backend.files[0])
        facts = {"weight_bytes": weight_bytes, "activation_bytes": memory.get("Activation")}
        (out / _FACTS_FILE).write_text(json.dumps(facts) + "\n", "utf-8")

    def _check_ports(self, component: ExportedComponent, network: Any) -> None:
        """The parsed network's inputs and outputs are the manifest's."""
        parsed = [network.get_input(i) for i in range(network.num_inputs)]
        parsed += [network.get_output(i) for i in range(network.num_outputs)]
        found = {t.name: (_name(self._trt.nptype(t.dtype)), tuple(t.shape)) for t in parsed}
        for port in (*component.inputs, *component.outputs):
            dtype, shape = found.get(port.name, ("missing", ()))
            wanted = tuple(-1 if isinstance(d, str) else d for d in port.shape)
            # The parser may leave an output's dimension open that is known to be fixed.
            fits = len(shape) == len(wanted) and all(
                d in (w, -1) for d, w in zip(shape, wanted, strict=True)
            )
            if dtype != port.dtype or not fits:
                raise Sd35Error(
                    f"{self._title} reads {component.name}'s {port.name} as {dtype} {shape}, "
                    f"not {port.dtype} {port.shape}",
                    "report this with the command",
                )

    def _configure(self, config: Any) -> None:
        trt = self._trt
        if self.backend.crosses:
            config.num_compute_capabilities = len(self._capabilities)
            for i, capability in enumerate(self._capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, _sm(capability)), i)
        if self._options.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if self._options.refit:
            config.set_flag(trt.BuilderFlag.REFIT)

    def _read_back(self, component: ExportedComponent, plan: Path) -> int:
        """Bytes of weights in a plan whose header says what was asked for.

        Raises:
            Sd35Error: it is for other GPUs, or its weights are not as small as the policy's.
        """
        header = read_header(plan)
        if header.compute_capabilities != tuple(sorted(self._capabilities, key=float)):
            raise Sd35Error(
                f"the plan of {component.name} is for compute capability "
                f"{', '.join(header.compute_capabilities)}, not {', '.join(self._capabilities)}",
                "report this with the command",
            )
        excess = header.weight_bytes - component.weight_bytes
        if excess > _TOLERANCE * component.weight_bytes + _SLACK:
            raise Sd35Error(
                f"the plan of {component.name} has {header.weight_bytes:,} bytes of weights, "
                f"the policy's are {component.weight_bytes:,}: {self._title} expanded them",
                "choose another --policy",
            )
        return header.weight_bytes


def _sm(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _name(dtype: Any) -> str:
    """A numpy type's name; bfloat16 and the like come as other objects."""
    return str(getattr(dtype, "__name__", dtype))


def _profile(builder: Any, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> Any:
    """An optimization profile: smallest, usual and largest shape of every input."""
    profile = builder.create_optimization_profile()
    for port in component.inputs:
        if port.dynamic:
            shapes = [port.resolve(**{d: b[i] for d, b in bounds.items()}) for i in range(3)]
            profile.set_shape(port.name, *shapes)
    return profile


def _parser_errors(parser: Any) -> str:
    """The parser's first errors: operator, node, reason."""
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, 3))]
    return "; ".join(
        f"{e.node_operator()} {e.node_name()}: {without_noise(e.desc())}" for e in errors
    )


def _attentions(trt: Any, network: Any) -> list[Any]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    outputs = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_OUTPUT]
    for layer in outputs:
        # A layer comes as its base class; the bindings know it by the class it is given.
        layer.__class__ = trt.IAttentionOutputLayer
    return [layer.attention for layer in outputs]


# The library's interfaces are subclassed in functions because it is imported at run time.


def _stream_writer(trt: Any, stream: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):
        """Writes the plan piece by piece; an error is kept, as the library would swallow it."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.bytes = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is None:
                try:
                    written = stream.write(data)
                except OSError as error:
                    self.error = error
                else:
                    self.bytes += written
                    return written
            return -1

    return Writer()


def _progress_monitor(trt: Any, progress: Callable[[float, str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Turns nested phases into one growing fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            # Innermost last: name, steps, steps done.
            self._phases: list[tuple[str, int, int]] = []
            self._reached = 0.0
            self._lock = threading.Lock()

        def _report(self) -> None:
            fraction, share = 0.0, 1.0
            for _, steps, done in self._phases:
                share /= steps
                fraction += share * done
            self._reached = max(self._reached, min(fraction, 1.0))
            note = self._phases[-1][0].lower() if self._phases else "writing"
            progress(self._reached, note)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases.append((phase, max(steps, 1), 0))
                self._report()

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                for i, (name, steps, _) in enumerate(self._phases):
                    if name == phase:
                        self._phases[i] = (name, steps, step + 1)
                self._report()
            return True

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._phases = [entry for entry in self._phases if entry[0] != phase]
                self._report()

    return Monitor()
