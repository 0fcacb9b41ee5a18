"""One denoising step of Large on a GPU: diffusers, and our programs in every way they can run.

A random transformer is made on the device, in FP32; its largest activations on one step are the
calibration, and what it computes then is what the errors are against. The step is that of a
1024×1024 picture with guidance: two samples of 4096 image and 333 text tokens. Programs run as in
the runtime: on its stream, recorded by its device, replayed. Times are medians by CUDA events.

    python benchmarks/hopper.py --out hopper.json
    python benchmarks/hopper.py --attempt 'fp8 max-autotune' --out hopper.json
    python benchmarks/hopper.py --device cpu --layers 1 --width small --out /tmp/hopper.json

The file is written after every attempt, and attempts that it has times of are not made again.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from sd35_trt.errors import Sd35Error
from sd35_trt.export.checkpoint import Weights
from sd35_trt.export.component import (
    MODULES,
    ExportOptions,
    apply_policy,
    build_part,
    fake_tensors,
)
from sd35_trt.export.program import parameter_value
from sd35_trt.export.scales import Scales
from sd35_trt.export.structure import published_config
from sd35_trt.export.torch_layers import use_torch_layers
from sd35_trt.policy import load_policy
from sd35_trt.program import Program
from sd35_trt.torch_program import TorchProgram

_WIDTHS: dict[str, dict[str, int]] = {
    "large": {},
    "small": {
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
    },
}

_GUIDANCE = 3.5
_TEXT = 77 + 256

# Of the flow's time, 1 to 0: a step in the middle.
_SIGMA, _NEXT = 0.7, 0.65


@dataclass(frozen=True)
class Attempt:
    """A way to compute the step.

    Attributes:
        policy: of a program; None is diffusers in BF16.
        mode: of compilation, or ``eager``.
        attention: the kernels that may be used.
        join: whether query, key and value are one product.
        fast: whether FP8 products are summed with less than FP32's precision.
    """

    name: str
    policy: str | None
    mode: str = "default"
    attention: tuple[str, ...] = ("cudnn", "flash", "math")
    join: bool = True
    fast: bool = False


_FLASH = ("flash", "math")
ATTEMPTS = (
    Attempt("diffusers eager", None, "eager"),
    Attempt("fp8", "fp8"),
    Attempt("half", "half"),
    Attempt("fp8 flash", "fp8", attention=_FLASH),
    Attempt("fp8 fast sums", "fp8", fast=True),
    Attempt("fp8 apart", "fp8", join=False),
    Attempt("diffusers compiled", None),
    Attempt("fp8 max-autotune", "fp8", "max-autotune"),
    Attempt("fp8 max-autotune fast sums", "fp8", "max-autotune", fast=True),
    Attempt("half max-autotune", "half", "max-autotune"),
    Attempt("fp8 eager", "fp8", "eager"),
)


class _Model:
    """A random transformer, as the exporter takes a checkpoint."""

    root = Path("random")

    def __init__(self, config: dict[str, Any], device: str) -> None:
        from diffusers import SD3Transformer2DModel

        self._config = config
        torch.manual_seed(0)
        with torch.device(device):
            self.module = SD3Transformer2DModel(**config).eval()
        self.tensors = _Tensors(self.module.state_dict())

    def config(self, part: str) -> dict[str, Any]:
        return dict(self._config)

    def weights(self, part: str) -> None:
        """The structure is traced without them."""


class _Tensors(Weights):
    """A state dictionary."""

    folder = Path("random")
    files: list[Path] = []  # noqa: RUF012 (as declared by the base)

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]

    def _file(self, name: str) -> Path:
        return self.folder


@dataclass(frozen=True)
class _Step:
    """What a step is given, of both branches, the unconditional one first; and its result."""

    latents: torch.Tensor
    prompts: torch.Tensor
    pooled: torch.Tensor
    scales: Scales
    truth: torch.Tensor


def _inputs(config: dict[str, Any], side: int, tokens: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    shapes = (
        (1, config["in_channels"], side, side),
        (2, tokens, config["joint_attention_dim"]),
        (2, config["pooled_projection_dim"]),
    )
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _diffusers_step(module: Any, latents: Any, prompts: Any, pooled: Any) -> torch.Tensor:
    """The latents after the step, FP32."""
    dtype = module.dtype
    velocity = module(
        hidden_states=torch.cat([latents, latents]).to(dtype),
        encoder_hidden_states=prompts.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=torch.full((2,), 1000 * _SIGMA, device=latents.device),
    ).sample.float()
    uncond, cond = velocity.chunk(2)
    return latents + (_NEXT - _SIGMA) * (uncond + _GUIDANCE * (cond - uncond))  # type: ignore[no-any-return]


def _truth(model: _Model, latents: Any, prompts: Any, pooled: Any) -> _Step:
    """The step in FP32, and the largest input of every linear in it."""
    amax: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            amax[f"denoiser/{name}"] = float(inputs[0].abs().amax())

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    truth = _diffusers_step(model.module, latents, prompts, pooled)
    for hook in hooks:
        hook.remove()
    return _Step(latents, prompts, pooled, Scales(amax), truth)


def _program(
    model: _Model, name: str, policy: str, scales: Scales, join: bool, device: str
) -> tuple[Program, dict[str, torch.Tensor]]:
    with fake_tensors():
        part = build_part("transformer", model)  # type: ignore[arg-type]
        apply_policy(part, name, load_policy(policy), scales)
        use_torch_layers(part, join)
        module = MODULES[name](part, ExportOptions(77, True, "program", join)).eval()
        program = module.program()
    values = {
        key: parameter_value(module, key, model.tensors).to(device) for key in program.weights()
    }
    return program, values


class _Recorder:
    """Runs a step as the runtime does: directly, then recorded."""

    def __init__(self, device: str) -> None:
        self._device: Any = None
        if device != "cpu":
            from sd35_trt.runtime.device import open_device
            from sd35_trt.runtime.inductor_session import TorchQueue

            self._device = open_device(device)
            self._queue = TorchQueue(self._device)

    def median_ms(self, work: Callable[[], None], runs: int, record: bool) -> float:
        if self._device is None:
            work()
            return statistics.median(_seconds(work) for _ in range(runs)) * 1e3
        torch.cuda.synchronize()  # inputs were made on another stream

        def queued() -> None:
            with self._queue.running():
                work()

        for _ in range(3):
            queued()
        self._device.synchronize()
        graph = self._device.capture(queued) if record else None
        again = graph.replay if graph else queued
        times = []
        for _ in range(runs):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(self._queue.stream)
            again()
            last.record(self._queue.stream)
            last.synchronize()
            times.append(first.elapsed_time(last))
        if graph:
            graph.close()
        return statistics.median(times)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _diffusers(model: _Model, step: _Step, attempt: Attempt, device: str) -> Callable[[], Any]:
    from diffusers import SD3Transformer2DModel

    with torch.device(device):
        module = SD3Transformer2DModel(**model.config("transformer")).to(torch.bfloat16).eval()
    for name, tensor in module.state_dict().items():
        tensor.copy_(model.tensors.read(name))
    if attempt.mode != "eager":
        for block in module.transformer_blocks:
            block.compile()
    return lambda: _diffusers_step(module, step.latents, step.prompts, step.pooled)


def _ours(model: _Model, step: _Step, attempt: Attempt, device: str) -> Callable[[], Any]:
    assert attempt.policy is not None
    scales, place = step.scales, torch.device(device)
    program, weights = _program(model, "conditioner", attempt.policy, scales, False, device)
    conditioner = TorchProgram(program, weights, place, "eager")
    half = torch.float16
    timesteps = torch.tensor([1000 * _SIGMA], device=device)
    given = {"prompt_embeds": step.prompts.to(half), "pooled": step.pooled.to(half)}
    conditioned = conditioner({**given, "timesteps": timesteps})
    context, modulation = conditioned["context"], conditioned["modulation"][0]
    ratio = _NEXT / _SIGMA
    inputs = {
        "latents": step.latents,
        "sigma": torch.tensor([_SIGMA], device=device),
        "coefficients": torch.tensor([[ratio, 1 - ratio, 0.0]], device=device),
        "previous_denoised": torch.zeros_like(step.latents),
        "context": context[1:].contiguous(),
        "modulation": modulation[1:].contiguous(),
        "uncond_context": context[:1].contiguous(),
        "uncond_modulation": modulation[:1].contiguous(),
        "guidance": torch.tensor([_GUIDANCE], device=device),
    }
    del conditioner, weights
    program, weights = _program(model, "denoiser", attempt.policy, scales, attempt.join, device)
    run = TorchProgram(program, weights, place, attempt.mode, attempt.attention, attempt.fast)
    return lambda: run(inputs)["next_latents"]


def _measure(
    model: _Model, step: _Step, attempt: Attempt, recorder: _Recorder, device: str, runs: int
) -> dict[str, Any]:
    on_gpu = device != "cpu"
    start = time.perf_counter()
    make = _diffusers if attempt.policy is None else _ours
    compute = make(model, step, attempt, device)
    made = time.perf_counter() - start
    result = torch.empty_like(step.truth)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()

    def work() -> None:
        result.copy_(compute())

    start = time.perf_counter()
    ms = recorder.median_ms(work, runs, record=attempt.policy is not None)
    row = {
        "ms": ms,
        "error": float((result - step.truth).norm() / (step.truth - step.latents).norm()),
        "seconds to make": made,
        "seconds to compile and measure": time.perf_counter() - start,
    }
    if on_gpu:
        row["activation GB"] = (torch.cuda.max_memory_allocated() - held) / 1e9
    return row


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--layers", default=38, show_default=True)
@click.option("--width", type=click.Choice(list(_WIDTHS)), default="large", show_default=True)
@click.option("--side", default=None, type=int, help="Of the latents. Default: 128, small 16.")
@click.option("--attempt", "names", multiple=True, help="Default: all, in this order.")
@click.option("--runs", default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("hopper.json"))
@torch.no_grad()
def main(
    device: str,
    layers: int,
    width: str,
    side: int | None,
    names: tuple[str, ...],
    runs: int,
    out: Path,
) -> None:
    """Measure, print a table, and write it as JSON."""
    torch.backends.cuda.matmul.allow_tf32 = False
    config = {**published_config("transformer"), "num_layers": layers, **_WIDTHS[width]}
    model = _Model(config, device)
    side = side or (128 if width == "large" else 16)
    step = _truth(model, *_inputs(config, side, _TEXT if width == "large" else 45, device))
    recorder = _Recorder(device)
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    rows = {name: row for name, row in rows.items() if "failed" not in row}
    print(f"{'':28}{'ms':>9}{'error':>10}{'compile s':>11}{'GB':>7}")
    for attempt in ATTEMPTS:
        if attempt.name in rows or (names and attempt.name not in names):
            continue
        try:
            row = _measure(model, step, attempt, recorder, device, runs)
        except (RuntimeError, Sd35Error) as error:
            row = {"failed": str(error).split("\n")[0]}
        rows[attempt.name] = row
        print(_line(attempt.name, row), flush=True)
        facts = {
            "torch": torch.__version__,
            "gpu": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
            "layers": layers,
            "width": width,
            "side": side,
            "rows": rows,
        }
        out.write_text(json.dumps(facts, indent=1) + "\n")
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def _line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:28} {row['failed']}"
    memory = row.get("activation GB", 0.0)
    compiled = row["seconds to compile and measure"]
    return f"{name:28}{row['ms']:9.2f}{row['error']:10.5f}{compiled:11.1f}{memory:7.2f}"


if __name__ == "__main__":
    main()
