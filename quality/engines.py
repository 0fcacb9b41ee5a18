"""A bundle's engines against ONNX Runtime on the CPU: the same inputs, component by component.

ONNX Runtime draws from the graphs that the engines were made from, operator by operator as they are
written. What each component was given then, its engine is given too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from sd35_trt.backends import BACKENDS
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.formats.step_cache import FIRST_STEPS, Coefficients, StepPlan
from sd35_trt.progress import Progress, silent
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.devices.opening import open_device
from sd35_trt.runtime.job import Job
from sd35_trt.runtime.request import Request
from sd35_trt.runtime.sessions.onnxruntime import OnnxRuntimeSession
from sd35_trt.runtime.sessions.session import Session, SessionOptions, device_of, open_session

from .bisection import Difference, first_difference
from .graph_sessions import written_options
from .marked_graphs import engine_runs, run_as_written
from .metrics import RelativeError
from .onnx_graph import Arrays, OnnxGraph
from .watched_session import WatchedSession

#: ‖a − b‖ / ‖b‖ that a component may have, by the coarsest precision in it.
#:
#: - fp32: sums in another order make 1e-5 (mini); TF32, which would make 1e-3, is off.
#: - half: mini's graphs in two dialects are 8e-4 apart; a step of Large on an H100 was 0.0104 from
#:   FP32.
#: - integer weights: products are computed in half, but ONNX Runtime's own kernels round the
#:   activations to 8 bits: 0.025 (mini).
#: - fp8: twice what FP16's rounding of the latents alone makes: 0.07 (mini at its smallest size).
BOUNDS = {"fp32": 1e-3, "half": 0.02, "int8-weight": 0.05, "int4-weight": 0.05, "fp8": 0.15}

#: What is drawn: a few steps, so that the denoiser sees noise and picture.
STEPS = 4
_PROMPT = "a large red star above a small blue square"

#: What is drawn besides, where steps can be short.
SHORT_STEPS = 4

# As if changes were a straight line.
_EXTRAPOLATED = (1.5, -0.5)

# Low: the model's own would multiply the rounding of both branches by 5.
_GUIDANCE = 1.5

# Of image to image, for the sake of the encoder, and of ControlNets.
_STRENGTH = 0.5


@dataclass(frozen=True)
class PortError:
    """How far an engine's output is from ONNX Runtime's.

    Attributes:
        precision: the coarsest in the component.
        error: ‖a − b‖ / ‖b‖ over all runs; None where it is not finite.
        bound: that it may have.
    """

    component: str
    port: str
    precision: str
    error: float | None
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error is not None and self.error <= self.bound


@dataclass(frozen=True)
class LayerSearch:
    """What looking for the layer came to, in a component that misses a bound.

    Attributes:
        difference: the first node that differs; None where there is none.
        note: why there is none.
    """

    component: str
    difference: Difference | None
    note: str = ""


@dataclass(frozen=True)
class EngineComparison:
    """A bundle's engines against ONNX Runtime.

    Attributes:
        device: that the engines ran on.
        steps: that were drawn.
        size: (width, height) of the picture in pixels.
    """

    bundle: str
    builder: str
    device: str
    steps: int
    size: tuple[int, int]
    ports: tuple[PortError, ...]
    searches: tuple[LayerSearch, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within its bound."""
        return all(port.passed for port in self.ports)


@dataclass(frozen=True)
class _Recorded:
    """A run of a component: its inputs, and the outputs of ONNX Runtime."""

    inputs: Arrays
    outputs: Arrays


def compare_engines(
    bundle: Bundle,
    graphs: Mapping[str, Path],
    steps: int = STEPS,
    seed: int = 0,
    device: str | None = None,
    bisect: bool = True,
    progress: Progress = silent,
) -> EngineComparison:
    """Compare every engine of a bundle.

    Args:
        graphs: the ONNX file of each component.
        device: where the engines run; None takes what the bundle was built for.
        bisect: whether to look for the layer where a bound is missed.

    Raises:
        Sd35Error: no such device here, or an engine that does not load or fails.
    """
    place = open_device(device_of(bundle, device))
    try:
        side = bundle.manifest.ranges.size[0]
        runs = _record(bundle, graphs, (side, side), steps, seed, progress)
        components = [c for c in bundle.manifest.components if c.name in runs]
        ports: list[PortError] = []
        searches: list[LayerSearch] = []
        for done, component in enumerate(components):
            progress("engines", done, len(components))
            actual = _run(bundle, component, place, runs[component.name])
            own = _errors(component, runs[component.name], actual)
            ports += own
            if bisect and not all(port.passed for port in own):
                worst = _worst_run(runs[component.name], actual)
                graph = OnnxGraph(graphs[component.name])
                searches.append(_search(bundle, component, graph, place, worst, progress))
        progress("engines", len(components), len(components))
        return EngineComparison(
            str(bundle.root), bundle.manifest.builder, place.name, steps, (side, side),
            tuple(ports), tuple(searches),
        )  # fmt: skip
    finally:
        place.close()


def _record(
    bundle: Bundle,
    graphs: Mapping[str, Path],
    size: tuple[int, int],
    steps: int,
    seed: int,
    progress: Progress,
) -> dict[str, list[_Recorded]]:
    """Runs of each component while ONNX Runtime draws a picture, and one from that."""
    runs: dict[str, list[_Recorded]] = {}

    def watch(
        bundle: Bundle, component: Component, device: Device, options: SessionOptions
    ) -> Session:
        def keep(inputs: Arrays, outputs: Arrays) -> None:
            runs.setdefault(component.name, []).append(_Recorded(_copy(inputs), _copy(outputs)))

        path = str(graphs[component.name])
        session = OnnxRuntimeSession(path, component.name, device, written_options())
        return WatchedSession(session, device, after=keep)

    manifest = bundle.manifest
    engines = tuple(replace(c, engine="onnxruntime") for c in manifest.components)
    peer = Bundle(bundle.root, replace(manifest, builder="onnxruntime", components=engines))
    prompts = [_PROMPT] * manifest.ranges.batch[0]
    guidance = _GUIDANCE if manifest.guided else None
    request: dict[str, Any] = {
        "prompt": prompts, "seed": seed, "steps": steps, "guidance": guidance,
    }  # fmt: skip
    encodes = manifest.component("vae_encoder") is not None
    short = SHORT_STEPS if manifest.features.short_steps else 0
    total = (steps * 2 if encodes else steps) + short
    with Pipeline(peer, open_session=watch, device="cpu") as pipe:
        done = iter(range(1, total + 1))

        def report(step: object) -> None:
            progress("reference", next(done, total), total)

        picture = pipe.generate(**request, size=size, callback=report).images[0]
        if encodes:
            nets = {control.name: picture for control in peer.manifest.controls}
            pipe.generate(
                **request, image=picture, strength=_STRENGTH, callback=report, controls=nets or None
            )
        if short:
            drawn = _with_short_steps(pipe.request(**{**request, "steps": short}, size=size))
            job = Job(drawn, report)
            pipe.draw([job])
            if isinstance(job.outcome, BaseException):
                raise job.outcome
        progress("reference", total, total)
    return runs


def _with_short_steps(request: Request) -> Request:
    """The request, its steps being short as soon as they can be: whatever a step cache says."""
    first: tuple[Coefficients | None, ...] = (None,) * FIRST_STEPS
    short = (_EXTRAPOLATED,) * (request.steps - FIRST_STEPS)
    plan = StepPlan(
        steps=request.steps,
        sampler=request.sampler,
        shift=request.shift,
        coefficients=first + short,
        error=0.0,
    )
    return dataclasses.replace(request, plan=plan)


def _copy(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}


def _run(
    bundle: Bundle, component: Component, device: Device, runs: Sequence[_Recorded]
) -> list[Arrays]:
    """An engine's outputs for the inputs of these runs."""
    device.activate()
    session = open_session(bundle, component, device, SessionOptions())
    results: list[Arrays] = []
    try:
        for run in runs:
            inputs = {
                port.name: device.upload(run.inputs[port.name].astype(port.dtype, copy=False))
                for port in component.inputs
            }
            outputs = {
                port.name: device.empty(run.outputs[port.name].shape, np.dtype(port.dtype))
                for port in component.outputs
            }
            session.run(inputs, outputs)
            results.append({name: device.download(b).copy() for name, b in outputs.items()})
    finally:
        session.close()
    return results


def _precision(component: Component) -> str:
    """The coarsest precision in a component."""
    own = [name for name in component.precisions if component.precisions[name]]
    return max(own, key=lambda name: (BOUNDS[name], name), default="fp32")


def _errors(
    component: Component, runs: Sequence[_Recorded], actual: Sequence[Arrays]
) -> list[PortError]:
    precision = _precision(component)
    rows = []
    for port in component.outputs:
        error = RelativeError()
        for run, outputs in zip(runs, actual, strict=True):
            error.add(outputs[port.name], run.outputs[port.name])
        rows.append(PortError(component.name, port.name, precision, error.ratio, BOUNDS[precision]))
    return rows


def _worst_run(runs: Sequence[_Recorded], actual: Sequence[Arrays]) -> Arrays:
    """Inputs of the run whose outputs are the furthest from the reference's."""

    def badness(index: int) -> float:
        worst = 0.0
        for name, expected in runs[index].outputs.items():
            error = RelativeError()
            error.add(actual[index][name], expected)
            worst = max(worst, np.inf if error.ratio is None else error.ratio)
        return worst

    return runs[max(range(len(runs)), key=badness)].inputs


def _search(
    bundle: Bundle,
    component: Component,
    graph: OnnxGraph,
    device: Device,
    inputs: Arrays,
    progress: Progress,
) -> LayerSearch:
    """Look for the first layer that differs."""
    name, title = component.name, BACKENDS[component.engine].title
    try:
        engine = engine_runs(bundle, component, graph, device)
        if engine is None:
            note = f"{title} on {device.name} does not run the graph with more outputs"
            return LayerSearch(name, None, note)
        reference, compiled = run_as_written(graph), engine
        difference = first_difference(
            graph,
            lambda names: compiled(inputs, names),
            lambda names: reference(inputs, names),
            BOUNDS[_precision(component)],
            lambda runs: progress(f"{name} layers", runs, runs + 1),
        )
    except Sd35Error as error:
        return LayerSearch(name, None, str(error))
    note = "" if difference else f"compiled anew, {title} computes it rightly"
    return LayerSearch(name, difference, note)
