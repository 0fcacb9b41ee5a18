"""One denoising step of a random model of SD3.5's exact size: milliseconds, and error against FP32.

    python benchmarks/step.py --out step.json
    python benchmarks/step.py --model medium --attempt 'programs*' --out medium.json
    python benchmarks/step.py --device cpu --layers 2 --width small --out /tmp/step.json

The transformer is made on the device, in FP32; its largest activations in one step are the
calibration, and what it computes then is what errors are against: relative to what the step changes
and, in the file, to the latents after it. The step has guidance, as of a 1024×1024 picture with 333
text tokens unless other sizes are asked for. Our engines run as in the runtime: on its stream,
recorded by its device where the backend can be, replayed. Peers are diffusers' transformer in BF16,
as it is and compiled, and with torchao's FP8. Times are medians by CUDA events. The weights are
random, so that the error is that of the arithmetic, not of pictures. Large takes 50 GB of the GPU's
memory, and with ONNX Runtime or TensorRT 17 GB of --work.

The file is written after every attempt, and attempts that it has are not made again.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import torch
from attempts import ATTEMPTS, Attempt
from denoising_step import DenoisingStep, random_inputs, true_step
from random_transformer import RandomTransformer
from recorder import Recorder
from step_sides import by_diffusers, by_engine, by_programs
from usual_way import by_the_usual_way

from sd35_trt.backends import BACKENDS
from sd35_trt.checkpoints.structure import published_config
from sd35_trt.errors import Sd35Error

_SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
}


def _measure(
    model: RandomTransformer,
    step: DenoisingStep,
    attempt: Attempt,
    recorder: Recorder,
    device: str,
    runs: int,
    work: Path | None,
) -> dict[str, Any]:
    on_gpu = device != "cpu"
    start, truth = time.perf_counter(), step.truth
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if attempt.kind == "program":
            compute, truth = by_programs(model, step, attempt, device)
        elif attempt.kind in BACKENDS:
            compute = by_engine(model, step, attempt, recorder.device, Path(folder))
        elif attempt.kind == "usual":
            compute = by_the_usual_way(model, step, attempt, Path(folder))
        else:
            compute = by_diffusers(model, step, attempt, device)
        seconds = time.perf_counter() - start
        result = torch.empty_like(step.truth)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            weight_bytes = torch.cuda.memory_allocated()

        def run() -> None:
            result.copy_(compute())

        start = time.perf_counter()
        ms = recorder.median_ms(run, runs, attempt.record)
    wrong = (result - truth).norm()
    row = {
        "ms": ms,
        "error": float(wrong / (truth - step.latents).norm()),
        "error of the latents": float(wrong / truth.norm()),
        "seconds to make": seconds,
        "seconds to compile and measure": time.perf_counter() - start,
    }
    if on_gpu and attempt.kind not in (*BACKENDS, "usual"):
        row["activation GB"] = (torch.cuda.max_memory_allocated() - weight_bytes) / 1e9
    if on_gpu:
        with_it = _device_bytes()
        del run, compute
        row["resident GB"] = (with_it - _device_bytes()) / 1e9
    return row


def _device_bytes() -> int:
    """Memory of the GPU that is in use, without what PyTorch keeps for later."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


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
    model = RandomTransformer(config, device)
    size = size or (1024 if width == "full" else 128)
    tokens = 333 if width == "full" else 45
    step = true_step(model, *random_inputs(config, batch, size // 8, tokens, device))
    recorder = Recorder(device)
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    rows = {attempt: row for attempt, row in rows.items() if "failed" not in row}
    print(f"{'':36}{'ms':>9}{'error':>10}{'make s':>8}{'run s':>8}{'act GB':>7}{'all GB':>7}")
    for attempt in ATTEMPTS:
        matches = not patterns or any(fnmatchcase(attempt.name, p) for p in patterns)
        if attempt.name in rows or not matches:
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
        torch.compiler.reset()
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def _line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:36} {row['failed']}"
    seconds = (row["seconds to make"], row["seconds to compile and measure"])
    memory = "".join(f"{row.get(key, 0.0):7.2f}" for key in ("activation GB", "resident GB"))
    times = f"{row['ms']:9.2f}{row['error']:10.5f}{seconds[0]:8.1f}{seconds[1]:8.1f}"
    return f"{name:36}{times}{memory}"


if __name__ == "__main__":
    main()
