"""Steps of a random model of SD3.5's exact size on one GPU and on two, each a branch of guidance.

    python benchmarks/two_gpus.py --device cuda:0,cuda:1 --out two.json
    python benchmarks/two_gpus.py --builder tensorrt --work /tmp --out two.json
    python benchmarks/two_gpus.py --device cpu,cpu --model mini --steps 4 --out /tmp/two.json

The transformer is made on the first device, in FP32; its largest activations in one step are the
calibration. Its denoisers then run in the runtime's own loop, on one device and on both, from the
same noise with the same text, of random numbers. A step's time is a run's divided by its steps,
the median of the runs. The latents of the two runs are compared, and so are those of a picture
drawn alone and with another one: what rounding does where only shapes differ. The exchange is what
two devices do between their graphs, alone, many times in a row.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from denoising_step import random_inputs, true_step
from random_transformer import RandomTransformer
from step import _SMALL

from sd35_trt.backends import BACKENDS, resolve
from sd35_trt.checkpoints.structure import published_config
from sd35_trt.compat.library import load_library
from sd35_trt.components import BRANCH_DENOISER, COMBINE
from sd35_trt.engines.builder import EngineOptions, ExportedComponent
from sd35_trt.engines.child_process import run_in_child
from sd35_trt.export.component import ExportOptions, export_component
from sd35_trt.export.scales import Scales
from sd35_trt.features import PLAIN
from sd35_trt.formats.bundle import Component, describe_file
from sd35_trt.formats.program import PROGRAM_FILE, TENSORS_FILE, read_program
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import load_policy
from sd35_trt.programs.tensors import read_tensors
from sd35_trt.programs.torch_program import TorchProgram
from sd35_trt.runtime.conditioning import StepConditioning
from sd35_trt.runtime.denoise import DenoiseLoop, Schedule
from sd35_trt.runtime.denoise_steps import RunInputs
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.devices.opening import open_device
from sd35_trt.runtime.devices.peer_copies import Copy, exchange
from sd35_trt.runtime.lane import BranchEngines
from sd35_trt.runtime.schedule import coefficients, make_sigmas, make_timesteps
from sd35_trt.runtime.sessions.session import Session, SessionOptions
from sd35_trt.runtime.short_steps import StepEngines
from sd35_trt.runtime.split_guidance import SplitGuidance, SplitRun
from sd35_trt.runtime.timing import Clock

_GUIDANCE, _SHIFT, _TRAIN_TIMESTEPS = 3.5, 3.0, 1000

_CLIP_TOKENS = 77

_EXCHANGES = 500


class Engines:
    """Exported components, and sessions of them on any device.

    Args:
        model: the checkpoint.
        builder: ``inductor``, ``tensorrt`` or ``onnxruntime``.
        dims: of the shapes that are drawn: bounds of what is compiled.
    """

    def __init__(
        self, model: RandomTransformer, builder: str, policy: str, scales: Scales, folder: Path,
        dims: dict[str, tuple[int, int, int]],
    ) -> None:  # fmt: skip
        self._backend = BACKENDS[builder]
        self._folder, self._dims = folder, dims
        version = getattr(load_library(self._backend), "__version__", None)
        self._dialect = self._backend.dialect(version)
        self._policy = load_policy(policy)
        self._scales = scales
        self._model = model
        self.entries: dict[str, Component] = {}

    def make(self, name: str) -> None:
        """Export a component, and compile it where that is done before it runs."""
        folder = self._export(name, self._dialect)
        exported = ExportedComponent.read(folder)
        weight_bytes = exported.weight_bytes
        if self._backend.times_kernels:
            from sd35_trt.engines.tensorrt_compiler import PlanFacts, PlanJob, compile_plan

            capability = "{}.{}".format(*torch.cuda.get_device_capability())
            settings = EngineOptions(timing=self._folder / "timings")
            job = PlanJob(self._backend.name, (capability,), settings, exported, self._dims, folder)
            run_in_child(f"compiling {name}", compile_plan, job, lambda *_: None)
            weight_bytes = PlanFacts.read(folder).weight_bytes
        files = tuple(
            describe_file(folder, file) for file in self._backend.files if (folder / file).exists()
        )
        self.entries[name] = Component(
            name, self._backend.name, files, exported.inputs, exported.outputs, weight_bytes,
            exported.precisions, {},
        )  # fmt: skip

    def conditioner(self, device: str) -> TorchProgram:
        """Operator by operator: it runs once."""
        folder = self._export("conditioner", "program")
        program = read_program(folder / PROGRAM_FILE)
        ports = ExportedComponent.read(folder).inputs
        self.text_dtype: torch.dtype = getattr(torch, ports[0].dtype)
        place = torch.device(device)
        weights = read_tensors(folder / TENSORS_FILE, program.weights(), place)
        return TorchProgram(program, weights, place, "eager")

    def _export(self, name: str, dialect: str) -> Path:
        folder = self._folder / name
        folder.mkdir()
        self._model.tensors.on_host = True
        options = ExportOptions(_CLIP_TOKENS, dialect=dialect)
        model: Any = self._model
        export_component(name, model, self._policy, options, folder, scales=self._scales)
        self._model.tensors.on_host = False
        return folder

    def let_go(self) -> None:
        """Free the checkpoint: everything is exported."""
        del self._model, self._scales
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def open(self, name: str, device: Device) -> Session:
        """A session of a component that was made."""
        manifest = SimpleNamespace(
            engine_options={"mode": "default", "fast_accumulation": True},
            versions={}, option_names=lambda key: [],
        )  # fmt: skip
        folder = self._folder / name
        bundle = SimpleNamespace(
            path=lambda file: folder / file, manifest=manifest, root=folder, trust_kernels=False
        )
        device.activate()
        session: Session = resolve(self._backend.session)(
            bundle, self.entries[name], device, SessionOptions()
        )
        return session

    @property
    def manifest(self) -> Any:
        """What the loop asks of a bundle's."""
        return SimpleNamespace(component=self.entries.get, features=PLAIN, guided=True, controls=())


class Runs:
    """Runs of the loop from the same noise and text.

    Args:
        conditioned: context [2 B, T, D] and modulation [S, 2 B, R, D] on the host.
        latents: float32 [B, C, h, w].
    """

    def __init__(
        self, device: Device, conditioned: tuple[np.ndarray, np.ndarray], latents: np.ndarray,
        sigmas: np.ndarray,
    ) -> None:  # fmt: skip
        self._device, self._latents = device, latents
        self._schedule = Schedule(sigmas, coefficients("euler", sigmas))
        device.activate()
        self._context, self._modulation = map(device.upload, conditioned)
        self._loop = DenoiseLoop(device)

    def inputs(self, device: Device) -> RunInputs:
        """Of the run, on a device."""
        device.activate()
        guidance = np.full(len(self._latents), _GUIDANCE, np.float32)
        return RunInputs({"guidance": device.upload(guidance)}, {})

    def draw(self, engines: StepEngines | SplitRun) -> np.ndarray:
        """The last latents."""

        def conditioning() -> Iterator[StepConditioning]:
            for index in range(len(self._modulation)):
                yield StepConditioning(self._context, self._modulation[index])

        mine = self.inputs(self._device)
        _, latents = self._loop.run(
            engines, self._latents, self._schedule, conditioning(), lambda step: True, False,
            Clock(), mine,
        )  # fmt: skip
        return latents.copy()

    def step_ms(self, engines: StepEngines | SplitRun, runs: int) -> tuple[float, np.ndarray]:
        """Of a step, the median of some runs; and the last latents."""
        times = []
        for number in range(runs + 2):  # the first two compile and record
            start = time.perf_counter()
            latents = self.draw(engines)
            if number > 1:
                times.append(time.perf_counter() - start)
        return statistics.median(times) / len(self._modulation) * 1e3, latents

    def close(self) -> None:
        """Release graphs and buffers."""
        self._loop.close()


def exchange_us(one: Device, other: Device, shape: tuple[int, ...]) -> float:
    """Microseconds of an exchange of latents, many being queued."""
    buffers = []
    for device in (one, other):
        device.activate()
        buffers.append([device.upload(np.zeros(shape, np.float32)) for _ in range(2)])
    (mine, its), (theirs, ours) = buffers

    def swap() -> None:
        exchange(one, other, [Copy(its, theirs)], [Copy(ours, mine)])

    swap()
    one.synchronize()
    start = time.perf_counter()
    for _ in range(_EXCHANGES):
        swap()
    one.synchronize()
    return (time.perf_counter() - start) / _EXCHANGES * 1e6


def _relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _config(name: str, layers: int | None) -> dict[str, Any]:
    if name == "mini":
        text = (checkpoint_path() / "transformer" / "config.json").read_text("utf-8")
        config = {k: v for k, v in json.loads(text).items() if not k.startswith("_")}
    elif name == "small":
        config = {**published_config("transformer", "large"), **_SMALL, "num_layers": 4}
    else:
        config = dict(published_config("transformer", name))
    return config if layers is None else {**config, "num_layers": layers}


def _features(
    config: dict[str, Any], batch: int, tokens: int, steps: int, run: TorchProgram, device: str,
    dtype: torch.dtype,
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:  # fmt: skip
    """Context and modulation of every step, of both branches, and the sigmas."""
    sigmas = make_sigmas(steps, _SHIFT, _TRAIN_TIMESTEPS)
    generator = torch.Generator("cpu").manual_seed(2)
    widths = config["joint_attention_dim"], config["pooled_projection_dim"]
    prompts = torch.randn((2 * batch, tokens, widths[0]), generator=generator).to(device, dtype)
    pooled = torch.randn((2 * batch, widths[1]), generator=generator).to(device, dtype)
    timesteps = torch.from_numpy(make_timesteps(sigmas[:-1], _TRAIN_TIMESTEPS)).to(device)
    made = run({"prompt_embeds": prompts, "pooled": pooled, "timesteps": timesteps})
    return (made["context"].cpu().numpy(), made["modulation"].cpu().numpy()), sigmas


@click.command()
@click.option("--device", "devices", default="cuda:0,cuda:1", show_default=True)
@click.option(
    "--model", "name", type=click.Choice(["large", "medium", "small", "mini"]), default="large"
)
@click.option("--layers", type=int, help="Fewer blocks, to try it out.")
@click.option("--builder", default="inductor", show_default=True)
@click.option("--policy", default="fp8", show_default=True)
@click.option("--size", type=int, help="Side in pixels. Default: 1024, of small models 128.")
@click.option("--steps", default=28, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--spread/--no-spread", default=True, help="Compare a batch of two, which compiles.")
@click.option("--work", type=click.Path(path_type=Path), help="For weights. Default: temporary.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.no_grad()
def main(
    devices: str, name: str, layers: int | None, builder: str, policy: str, size: int | None,
    steps: int, runs: int, spread: bool, work: Path | None, out: Path,
) -> None:  # fmt: skip
    """Measure, print, and write JSON."""
    torch.backends.cuda.matmul.allow_tf32 = False
    first, second = devices.split(",")
    config = _config(name, layers)
    full = name in ("large", "medium")
    side, tokens = (size or (1024 if full else 128)) // 8, 333 if full else 45
    facts: dict[str, Any] = {
        "torch": torch.__version__, "model": name, "layers": config["num_layers"],
        "builder": builder, "policy": policy, "size": 8 * side, "steps": steps,
        "gpus": [_title(one) for one in (first, second)],
    }  # fmt: skip

    def note(**rows: Any) -> None:
        facts.update(rows)
        out.write_text(json.dumps(facts, indent=1) + "\n")
        print(*(f"{key}: {value}" for key, value in rows.items()), sep="\n", flush=True)

    start = time.perf_counter()
    model = RandomTransformer(config, first)
    step = true_step(model, *random_inputs(config, 1, side, tokens, first))
    one, other = (open_device(device) for device in (first, second))
    if not one.reaches(other):
        raise click.ClickException(f"copies between {devices} do not go directly")
    note(**{"exchange us": round(exchange_us(one, other, (1, 16, side, side)), 1)})
    height = (side, side, side)
    bounds = {"batch": (1, 1, 2), "tokens": (tokens,) * 3, "height": height, "width": height}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        engines = Engines(model, builder, policy, step.scales, Path(folder), bounds)
        made = engines.conditioner(first)
        latents = np.random.default_rng(3).standard_normal((1, 16, side, side), np.float32)
        alone, sigmas = _features(config, 1, tokens, steps, made, first, engines.text_dtype)
        pair = _with_another(alone, config, tokens, steps, made, first, engines.text_dtype)
        del made
        for component in ("denoiser", BRANCH_DENOISER, COMBINE):
            engines.make(component)
        del model, step
        engines.let_go()
        note(**{"seconds to make": round(time.perf_counter() - start, 1)})
        picture = Runs(one, alone, latents, sigmas)
        rows: dict[str, Any] = {}
        full_steps = StepEngines(engines.manifest, engines.open("denoiser", one))
        rows["one: ms per step"], expected = picture.step_ms(full_steps, runs)
        note(**rows)
        lanes = tuple(
            BranchEngines(engines.open(BRANCH_DENOISER, device), engines.open(COMBINE, device))
            for device in (one, other)
        )
        guidance = SplitGuidance((one, other), engines.manifest)
        inputs = picture.inputs(other)
        one.activate()
        split = SplitRun(guidance, (lanes[0], lanes[1]), inputs)
        ms, found = picture.step_ms(split, runs)
        note(**{"two: ms per step": ms, "two against one": _relative(found, expected)})
        note(**{"times as fast": rows["one: ms per step"] / ms})
        guidance.forget()
        if spread:
            pictures = Runs(one, pair, np.concatenate([latents, -latents]), sigmas)
            of_two = pictures.draw(full_steps)[:1]
            note(**{"spread of batch 1 and 2": _relative(of_two, expected)})
            pictures.close()
        picture.close()
        for session in (
            full_steps.full,
            *(s for lane in lanes for s in (lane.branch, lane.combine)),
        ):
            session.close()
        one.close()
        other.activate()
        other.close()


def _with_another(
    alone: tuple[np.ndarray, np.ndarray], config: dict[str, Any], tokens: int, steps: int,
    run: TorchProgram, device: str, dtype: torch.dtype,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The same picture's, and another one's behind it in each branch."""
    (context, modulation), _ = _features(config, 2, tokens, steps, run, device, dtype)
    for branch in range(2):
        context[2 * branch], modulation[:, 2 * branch] = alone[0][branch], alone[1][:, branch]
    return context, modulation


def _title(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
