"""From a cold process to the first picture: this runtime against diffusers.

Each run is a process of its own; the two alternate, and the first of each is not counted: files
are in the page cache, kernels in theirs. Figures are medians, and the ratio is of the medians of
the same session.

    sd35-trt build --gpu cpu --out bundles/mini-cpu
    python benchmarks/startup.py bundles/mini-cpu
    python benchmarks/startup.py bundles/mini-cpu --libsd35 build/cpp/release --out libsd35.json
    python benchmarks/startup.py bundles/large --device cuda --model ~/large --out large.json

With --libsd35 the peer is this runtime's C++ library, with the same ONNX Runtime, and what passes
outside ONNX Runtime is told from what passes in it.

A first step includes the text encoders and the conditioning.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sd35_trt.mini import checkpoint_path

_PROMPT = "a small red circle to the left of a large blue square"

_HEAD = """
import json, sys, time
t0 = time.perf_counter()
bundle, model, device, arguments = json.loads(sys.argv[1])
steps = []
"""

_TAIL = """
t3 = time.perf_counter()
first = steps[0]
print(json.dumps({"import": t1 - t0, "load": t2 - t1, "first step": first - t2,
                  "the rest of the picture": t3 - first, "to the first step": first - t0,
                  "to the first picture": t3 - t0}))
"""

_OURS = f"""{_HEAD}
from sd35_trt.runtime import Pipeline
t1 = time.perf_counter()
pipe = Pipeline.load(bundle, device=device, trust_kernels=True)
pipe.preload()
t2 = time.perf_counter()
pipe({_PROMPT!r}, seed=0, callback=lambda _: steps.append(time.perf_counter()))
{_TAIL}"""

_PEER = f"""{_HEAD}
import torch
from diffusers import StableDiffusion3Pipeline
t1 = time.perf_counter()
dtype = torch.float32 if device == "cpu" else torch.bfloat16
pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype).to(device)
pipe.set_progress_bar_config(disable=True)
t2 = time.perf_counter()
def after_step(*_):
    if device != "cpu":
        torch.cuda.synchronize()
    steps.append(time.perf_counter())
    return {{}}
pipe({_PROMPT!r}, generator=torch.Generator("cpu").manual_seed(0), callback_on_step_end=after_step,
     **arguments)
{_TAIL}"""

# As cpp/tests/startup.cpp prints them, and the seconds in which ONNX Runtime was at work.
_MOMENTS = f"""{_HEAD}
calls = []
def watched(function):
    def call(*args, **options):
        begin = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            calls.append((begin, time.perf_counter()))
    return call
begun = time.time()
from sd35_trt.runtime import Pipeline
ort = watched(__import__)("onnxruntime")
for name in ("__init__", "run_with_iobinding"):
    setattr(ort.InferenceSession, name, watched(getattr(ort.InferenceSession, name)))
imported = time.time()
pipe = Pipeline.load(bundle)
pipe.preload()
loaded = time.time()
pipe({_PROMPT!r}, seed=0, callback=lambda _: steps.append(time.time()))
picture = time.time()
inside = end = 0.0
for begin, last in sorted(calls):
    inside += max(last, end) - max(begin, end)
    end = max(last, end)
print(json.dumps({{"begun": begun, "imported": imported, "loaded": loaded,
                  "first step": steps[0], "picture": picture, "engines": inside}}))
"""


def _run(code: str, argument: str) -> dict[str, float]:
    result: dict[str, float] = _child([sys.executable, "-c", code, argument], {})
    return result


def _child(command: list[str], environment: dict[str, str]) -> Any:
    """What the last line says that a child process prints."""
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if process.returncode:
        raise click.ClickException(f"a run failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def _python_moments(argument: str) -> dict[str, float]:
    start = time.time()
    return _rows(start, _child([sys.executable, "-c", _MOMENTS, argument], {}))


def _libsd35_moments(build: Path, bundle: Path) -> dict[str, float]:
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "observations.json"
        environment = {
            "SD35_BACKENDS": str((build / "tests" / "observer").resolve()),
            "SD35_OBSERVED": str((build / "sd35" / "libsd35-onnxruntime.so").resolve()),
            "SD35_OBSERVATIONS": str(seen),
            "SD35_ONNXRUNTIME": str(library),
        }
        start = time.time()
        moments = _child([str(build / "tests" / "startup"), str(bundle), _PROMPT], environment)
        moments["engines"] = json.loads(seen.read_text("utf-8"))["engines_seconds"]
    return _rows(start, moments)


def _rows(start: float, moments: dict[str, float]) -> dict[str, float]:
    """Seconds from a process's start on."""
    whole = moments["picture"] - start
    return {
        "to its first line": moments["begun"] - start,
        "import": moments["imported"] - moments["begun"],
        "load": moments["loaded"] - moments["imported"],
        "first step": moments["first step"] - moments["loaded"],
        "the rest of the picture": moments["picture"] - moments["first step"],
        "to the first picture": whole,
        "of these outside ONNX Runtime": whole - moments["engines"],
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=checkpoint_path(),
    help="The checkpoint behind BUNDLE. Default: mini.",
)
@click.option("--alone", is_flag=True, help="Without diffusers.")
@click.option(
    "--libsd35",
    "build",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where libsd35 and its tests were built: the peer, in place of diffusers.",
)
@click.option("--runs", default=7, show_default=True, help="Counted runs of each, after one more.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/startup.json")
)
def main(
    bundle: Path, device: str, model: Path, alone: bool, build: Path | None, runs: int, out: Path
) -> None:  # fmt: skip
    """Measure, print a table, and write it as JSON."""
    defaults = json.loads((bundle / "bundle.json").read_text())["defaults"]
    arguments = {
        "num_inference_steps": defaults["steps"],
        "guidance_scale": defaults["guidance"],
        "width": defaults["size"][0],
        "height": defaults["size"][1],
        "max_sequence_length": defaults["t5_tokens"],
    }
    argument = json.dumps([str(bundle), str(model), device, arguments])
    measures: dict[str, Callable[[], dict[str, float]]]
    if build is not None:
        there = build
        measures = {
            "libsd35": lambda: _libsd35_moments(there, bundle),
            "Python": lambda: _python_moments(argument),
        }
    else:
        measures = {"sd35-trt": lambda: _run(_OURS, argument)}
        if not alone:
            measures["diffusers"] = lambda: _run(_PEER, argument)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
    for i in range(runs + 1):
        for name, measure in measures.items():
            result = measure()
            if i:
                rows[name].append(result)
    medians = {
        name: {key: statistics.median(row[key] for row in results) for key in results[0]}
        for name, results in rows.items()
    }
    names = list(measures)
    heads = "".join(f"{name:>11}" for name in names)
    ratios = len(names) > 1
    print(f"{'seconds, median of ' + str(runs):<30}{heads}{'   ratio' if ratios else ''}")
    for key in medians[names[0]]:
        seconds = [medians[name][key] for name in names]
        ratio = f"{seconds[0] / seconds[1]:>8.2f}" if ratios and seconds[1] else ""
        print(f"{key:<30}{''.join(f'{value:>11.3f}' for value in seconds)}{ratio}")
    facts = {"device": device, "medians": medians, "runs": rows, "defaults": defaults}
    out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
