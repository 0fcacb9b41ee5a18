"""One denoising step of a random model of SD3.5's exact size: milliseconds, and error against FP32.

    python benchmarks/step.py --out step.json
    python benchmarks/step.py --model medium --attempt 'programs*' --out medium.json
    python benchmarks/step.py --device cpu --layers 1 --width small --out /tmp/step.json

The transformer is made on the device, in FP32; its largest activations in one step are the
calibration, and what it computes then is what errors are against: relative to what the step changes
and, in the file, to the latents after it. The step has guidance, as of a 1024×1024 picture with 333
text tokens unless other sizes are asked for. Our engines run as in the runtime: on its stream,
recorded by its device where the backend can be, replayed. Peers are diffusers' transformer in BF16,
as it is and compiled, and with torchao's FP8. Times are medians by CUDA events. The weights are
random, so that the error is that of the arithmetic, not of pictures. Large takes 50 GB of the GPU's
memory, and with ONNX Runtime 17 GB of --work.

The file is written after every attempt, and attempts that it has are not made again.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from sd35_trt.checkpoints.diffusers import Weights
from sd35_trt.checkpoints.structure import published_config
from sd35_trt.engines.builder import MODEL_FILE, ExportedComponent
from sd35_trt.errors import Sd35Error
from sd35_trt.export.component import (
    MODULES,
    ExportOptions,
    apply_policy,
    build_part,
    export_component,
    fake_tensors,
)
from sd35_trt.export.fused_block import fuse_blocks
from sd35_trt.export.program_writer import parameter_value
from sd35_trt.export.scales import Scales
from sd35_trt.export.torch_layers import use_torch_layers
from sd35_trt.formats.program import Program
from sd35_trt.policies import Policy, Rule, load_policy
from sd35_trt.programs.torch_program import ATTENTION, MODES, TorchProgram
from sd35_trt.runtime.devices.cpu import CpuDevice
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.devices.opening import open_device

_SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
}

_CLIP_TOKENS = 77
_GUIDANCE = 3.5

# Of the flow's time, 1 to 0: a step in the middle.
_SIGMA, _NEXT = 0.7, 0.65

_CUDNN = ("cudnn", "math")

# Layers of an attention that put out its operands.
_OPERANDS = {
    "norm_q": "q", "norm_added_q": "q", "norm_k": "k", "norm_added_k": "k", "to_v": "v",
    "add_v_proj": "v",
}  # fmt: skip

Tensors = dict[str, torch.Tensor]
Compute = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Attempt:
    """A way to compute the step.

    Attributes:
        kind: ``diffusers``, ``torchao``, ``program`` or ``onnxruntime``.
        policy: of ours.
        mode: of compilation: a key of ``MODES``, or ``eager``.
        record: whether it is recorded and replayed.
        join, fuse: of :class:`sd35_trt.export.component.ExportOptions`.
        attention: the kernels that may be used.
        fast: whether FP8 products are summed with less than FP32's precision.
        fp8_attention: whether the operands of attentions are E4M3 too.
    """

    name: str
    kind: str
    policy: str = "fp8"
    mode: str = "default"
    record: bool = True
    join: bool = True
    fuse: bool = True
    attention: tuple[str, ...] = tuple(ATTENTION)
    fast: bool = True
    fp8_attention: bool = False


ATTEMPTS = (
    Attempt("diffusers BF16", "diffusers", mode="eager", record=False),
    Attempt("programs fp8", "program"),
    Attempt("diffusers BF16, blocks compiled", "diffusers", record=False),
    Attempt("programs half", "program", "half"),
    Attempt("programs fp8, exact sums", "program", fast=False),
    Attempt("programs fp8, not fused", "program", fuse=False),
    Attempt("programs fp8, not joined", "program", fuse=False, join=False),
    Attempt("programs fp8, cuDNN's attention", "program", attention=_CUDNN),
    Attempt("programs half, cuDNN's attention", "program", "half", attention=_CUDNN),
    Attempt("programs fp8, eager", "program", mode="eager"),
    Attempt("onnxruntime half", "onnxruntime", "half", record=False),
    Attempt("onnxruntime fp8", "onnxruntime", record=False),
    Attempt("torchao FP8 rowwise, compiled", "torchao", record=False),
    Attempt("programs fp8, FP8 attention", "program", fp8_attention=True),
    Attempt("diffusers BF16, max-autotune, graph", "diffusers", mode="max-autotune"),
    Attempt("programs fp8, max-autotune", "program", mode="max-autotune"),
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

    def weights(self, part: str) -> Weights:
        return self.tensors

    def attentions(self) -> list[str]:
        """Names of its attentions."""
        from diffusers.models.attention_processor import Attention

        return [name for name, part in self.module.named_modules() if isinstance(part, Attention)]


class _Tensors(Weights):
    """A state dictionary.

    Attributes:
        on_host: whether tensors are read as the host's.
    """

    folder = Path("random")
    files: list[Path] = []  # noqa: RUF012 (as declared by the base)
    on_host = False

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._state[name]
        return tensor.cpu() if self.on_host else tensor

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


def _inputs(
    config: dict[str, Any], batch: int, side: int, tokens: int, device: str
) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    shapes = (
        (batch, config["in_channels"], side, side),
        (2 * batch, tokens, config["joint_attention_dim"]),
        (2 * batch, config["pooled_projection_dim"]),
    )
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _diffusers_step(module: Any, latents: Any, prompts: Any, pooled: Any) -> torch.Tensor:
    """The latents after the step, FP32."""
    dtype = module.dtype
    velocity = module(
        hidden_states=torch.cat([latents, latents]).to(dtype),
        encoder_hidden_states=prompts.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=torch.full((2 * len(latents),), 1000 * _SIGMA, device=latents.device),
    ).sample.float()
    uncond, cond = velocity.chunk(2)
    return latents + (_NEXT - _SIGMA) * (uncond + _GUIDANCE * (cond - uncond))  # type: ignore[no-any-return]


def _truth(model: _Model, latents: Any, prompts: Any, pooled: Any) -> _Step:
    """The step in FP32, and the largest input of every linear, and operand of every attention."""
    from diffusers.models.attention_processor import Attention

    amax: dict[str, float] = {}
    bmm: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            amax[f"denoiser/{name}"] = float(inputs[0].abs().amax())

        return hook

    def operand(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            bmm[key] = max(bmm.get(key, 0.0), float(output.abs().amax()))

        return hook

    hooks = []
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(watch(name)))
        if isinstance(module, Attention):
            key = f"denoiser/{name}"
            bmm[f"{key}.p"] = 1.0
            for child, letter in _OPERANDS.items():
                if getattr(module, child, None) is not None:
                    layer = getattr(module, child)
                    hooks.append(layer.register_forward_hook(operand(f"{key}.{letter}")))
    truth = _diffusers_step(model.module, latents, prompts, pooled)
    for handle in hooks:
        handle.remove()
    return _Step(latents, prompts, pooled, Scales(amax, bmm), truth)


class _Recorder:
    """Runs a step as the runtime does: directly, then recorded."""

    def __init__(self, device: str) -> None:
        self.device: Device = CpuDevice() if device == "cpu" else open_device(device)
        self._queue: Any = None
        if device != "cpu":
            from sd35_trt.programs.torch_queue import TorchQueue

            self._queue = TorchQueue(self.device.index, self.device.stream)

    def median_ms(self, work: Callable[[], None], runs: int, record: bool) -> float:
        if self._queue is None:
            work()
            return statistics.median(_seconds(work) for _ in range(runs)) * 1e3
        torch.cuda.synchronize()  # inputs were made on another stream

        def queued() -> None:
            with self._queue.running():
                work()

        for _ in range(3):
            queued()
        self.device.synchronize()
        graph = self.device.capture(queued) if record else None
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


def _diffusers(model: _Model, step: _Step, attempt: Attempt, device: str) -> Compute:
    from diffusers import SD3Transformer2DModel

    with torch.device(device):
        module = SD3Transformer2DModel(**model.config("transformer")).to(torch.bfloat16).eval()
    for name, tensor in module.state_dict().items():
        tensor.copy_(model.tensors.read(name))
    if attempt.kind == "torchao":
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        # Its own settings of the compiler would stay for what is measured after it; their tuning
        # takes minutes.
        plain = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
        quantize_(module.transformer_blocks, plain)
    if attempt.mode != "eager":
        for block in module.transformer_blocks:
            block.compile(mode=MODES[attempt.mode])
    return lambda: _diffusers_step(module, step.latents, step.prompts, step.pooled)


def _policy(attempt: Attempt, model: _Model) -> Policy:
    policy = load_policy(attempt.policy)
    if not attempt.fp8_attention:
        return policy
    # Medium has two in some blocks.
    names = {name.rpartition(".")[2] for name in model.attentions()}
    rules = [
        Rule("denoiser", f"transformer_blocks.*.{name}", "fp8", "the matmuls too")
        for name in sorted(names)
    ]
    return Policy(policy.name, policy.description, (*policy.rules, *rules))


def _conditioner_inputs(step: _Step, dtype: torch.dtype) -> Tensors:
    timesteps = torch.tensor([1000 * _SIGMA], device=step.latents.device)
    given = {"prompt_embeds": step.prompts.to(dtype), "pooled": step.pooled.to(dtype)}
    return {**given, "timesteps": timesteps}


def _denoiser_inputs(step: _Step, context: torch.Tensor, modulation: torch.Tensor) -> Tensors:
    """Of a denoiser; ``modulation`` is of one step."""
    device, batch = step.latents.device, len(step.latents)
    ratio = _NEXT / _SIGMA
    return {
        "latents": step.latents,
        "sigma": torch.full((batch,), _SIGMA, device=device),
        "coefficients": torch.tensor([[ratio, 1 - ratio, 0.0]] * batch, device=device),
        "previous_denoised": torch.zeros_like(step.latents),
        "context": context[batch:].contiguous(),
        "modulation": modulation[batch:].contiguous(),
        "uncond_context": context[:batch].contiguous(),
        "uncond_modulation": modulation[:batch].contiguous(),
        "guidance": torch.full((batch,), _GUIDANCE, device=device),
    }


def _program(
    model: _Model, name: str, attempt: Attempt, scales: Scales, device: str
) -> tuple[Program, Tensors]:
    with fake_tensors():
        part = build_part("transformer", model)  # type: ignore[arg-type]
        apply_policy(part, name, _policy(attempt, model), scales)
        use_torch_layers(part, attempt.join)
        if attempt.fuse:
            fuse_blocks(part)
        options = ExportOptions(_CLIP_TOKENS, True, "program", attempt.join, attempt.fuse)
        module = MODULES[name](part, options).eval()
        program = module.program()
    values = {
        key: parameter_value(module, key, model.tensors).to(device) for key in program.weights()
    }
    return program, values


def _programs(model: _Model, step: _Step, attempt: Attempt, device: str) -> Compute:
    place = torch.device(device)
    program, weights = _program(model, "conditioner", attempt, step.scales, device)
    conditioner = TorchProgram(program, weights, place, "eager")
    conditioned = conditioner(_conditioner_inputs(step, torch.float16))
    inputs = _denoiser_inputs(step, conditioned["context"], conditioned["modulation"][0])
    del conditioner, weights
    program, weights = _program(model, "denoiser", attempt, step.scales, device)
    run = TorchProgram(program, weights, place, attempt.mode, attempt.attention, attempt.fast)
    return lambda: run(inputs)["next_latents"]


def _onnxruntime(
    model: _Model, step: _Step, attempt: Attempt, device: Device, folder: Path
) -> Compute:
    from sd35_trt.runtime.sessions.onnxruntime import OnnxRuntimeSession, session_options

    def session(name: str) -> tuple[ExportedComponent, OnnxRuntimeSession]:
        out = folder / name
        out.mkdir()
        model.tensors.on_host = True
        options = ExportOptions(_CLIP_TOKENS)
        export_component(name, model, _policy(attempt, model), options, out, scales=step.scales)  # type: ignore[arg-type]
        model.tensors.on_host = False
        component = ExportedComponent.read(out)
        settings = session_options(fp8=bool(component.precisions.get("fp8")))
        return component, OnnxRuntimeSession(str(out / MODEL_FILE), name, device, settings)

    def run(name: str, inputs: Tensors, **dims: int) -> tuple[Callable[[], None], dict[str, Any]]:
        component, engine = session(name)
        feed = {p.name: device.upload(inputs[p.name].cpu().numpy()) for p in component.inputs}
        outputs = {p.name: device.empty(p.resolve(**dims), p.dtype) for p in component.outputs}
        return functools.partial(engine.run, feed, outputs), outputs

    batch, tokens = len(step.latents), step.prompts.shape[1]
    half = _conditioner_inputs(step, torch.float16)
    compute, outputs = run("conditioner", half, samples=2 * batch, tokens=tokens, steps=1)
    compute()
    context, modulation = (
        torch.from_numpy(np.asarray(device.download(outputs[name])))
        for name in ("context", "modulation")
    )
    del compute, outputs
    gc.collect()
    inputs = _denoiser_inputs(step, context, modulation[0])
    height, width = step.latents.shape[2:]
    compute, outputs = run("denoiser", inputs, batch=batch, height=height, width=width)

    def result() -> torch.Tensor:
        compute()
        buffer = outputs["next_latents"]
        if device.kind == "cpu":
            return torch.from_numpy(np.asarray(buffer))
        from sd35_trt.runtime.sessions.inductor import _CudaArray

        return torch.as_tensor(
            _CudaArray(device.pointer(buffer), buffer), device=step.latents.device
        )

    return result


def _measure(
    model: _Model,
    step: _Step,
    attempt: Attempt,
    recorder: _Recorder,
    device: str,
    runs: int,
    work: Path | None,
) -> dict[str, Any]:
    on_gpu = device != "cpu"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if attempt.kind == "program":
            compute = _programs(model, step, attempt, device)
        elif attempt.kind == "onnxruntime":
            compute = _onnxruntime(model, step, attempt, recorder.device, Path(folder))
        else:
            compute = _diffusers(model, step, attempt, device)
        made = time.perf_counter() - start
        result = torch.empty_like(step.truth)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()

        def run() -> None:
            result.copy_(compute())

        start = time.perf_counter()
        ms = recorder.median_ms(run, runs, attempt.record)
    wrong = (result - step.truth).norm()
    row = {
        "ms": ms,
        "error": float(wrong / (step.truth - step.latents).norm()),
        "error of the latents": float(wrong / step.truth.norm()),
        "seconds to make": made,
        "seconds to compile and measure": time.perf_counter() - start,
    }
    if on_gpu and attempt.kind != "onnxruntime":
        row["activation GB"] = (torch.cuda.max_memory_allocated() - held) / 1e9
    return row


@click.command()
@click.option("--model", "name", type=click.Choice(["large", "medium"]), default="large")
@click.option("--device", default="cuda", show_default=True)
@click.option("--layers", default=None, type=int, help="Fewer blocks, to try it out.")
@click.option("--width", type=click.Choice(["full", "small"]), default="full", show_default=True)
@click.option("--batch", default=1, show_default=True, help="Pictures.")
@click.option("--size", default=None, type=int, help="Side in pixels. Default: 1024, small 128.")
@click.option("--attempt", "patterns", multiple=True, help="By name, or glob. Default: all.")
@click.option("--runs", default=20, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="For ONNX files. Default: temporary.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.no_grad()
def main(
    name: str, device: str, layers: int | None, width: str, batch: int, size: int | None,
    patterns: tuple[str, ...], runs: int, work: Path | None, out: Path,
) -> None:  # fmt: skip
    """Measure, print a table, and write it as JSON."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    config = published_config("transformer", name)
    if width == "small":
        config |= _SMALL
    if layers is not None:
        dual = config.get("dual_attention_layers") or ()
        config |= {"num_layers": layers, "dual_attention_layers": [i for i in dual if i < layers]}
    model = _Model(config, device)
    size = size or (1024 if width == "full" else 128)
    tokens = 333 if width == "full" else 45
    step = _truth(model, *_inputs(config, batch, size // 8, tokens, device))
    recorder = _Recorder(device)
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    rows = {attempt: row for attempt, row in rows.items() if "failed" not in row}
    print(f"{'':36}{'ms':>9}{'error':>10}{'make s':>8}{'run s':>8}{'GB':>7}")
    for attempt in ATTEMPTS:
        wanted = not patterns or any(fnmatchcase(attempt.name, p) for p in patterns)
        if attempt.name in rows or not wanted:
            continue
        try:
            row = _measure(model, step, attempt, recorder, device, runs, work)
        except (RuntimeError, ImportError, Sd35Error) as error:
            row = {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}
        rows[attempt.name] = row
        print(_line(attempt.name, row), flush=True)
        facts = {
            "torch": torch.__version__,
            "gpu": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
            "model": name,
            "layers": config["num_layers"],
            "width": width,
            "batch": batch,
            "size": size,
            "tokens": tokens,
            "rows": rows,
        }
        out.write_text(json.dumps(facts, indent=1) + "\n")
        torch._dynamo.reset()
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def _line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:36} {row['failed']}"
    seconds = (row["seconds to make"], row["seconds to compile and measure"])
    memory = row.get("activation GB", 0.0)
    times = f"{row['ms']:9.2f}{row['error']:10.5f}{seconds[0]:8.1f}{seconds[1]:8.1f}"
    return f"{name:36}{times}{memory:7.2f}"


if __name__ == "__main__":
    main()
