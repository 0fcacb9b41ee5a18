"""From a cold process to the first picture: this runtime against diffusers.

Each run is a process of its own; the two alternate, and the first of each is not counted: files
are in the page cache, kernels in theirs. Figures are medians, and the ratio is of the medians of
the same session.

    sd35-trt build --gpu cpu --out bundles/mini-cpu
    python benchmarks/startup.py bundles/mini-cpu
    python benchmarks/startup.py bundles/large --device cuda --model ~/large --out large.json

A first step includes the text encoders and the conditioning.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

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


def _run(code: str, argument: str) -> dict[str, float]:
    process = subprocess.run(
        [sys.executable, "-c", code, argument], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise click.ClickException(f"a run failed:\n{process.stderr}")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


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
@click.option("--runs", default=7, show_default=True, help="Counted runs of each, after one more.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/startup.json")
)
def main(bundle: Path, device: str, model: Path, alone: bool, runs: int, out: Path) -> None:
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
    codes = {"sd35-trt": _OURS} if alone else {"sd35-trt": _OURS, "diffusers": _PEER}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for i in range(runs + 1):
        for name, code in codes.items():
            result = _run(code, argument)
            if i:
                rows[name].append(result)
    medians = {
        name: {key: statistics.median(row[key] for row in results) for key in results[0]}
        for name, results in rows.items()
    }
    heads = "".join(f"{name:>11}" for name in codes)
    print(f"{'seconds, median of ' + str(runs):<24}{heads}{'' if alone else '   ratio'}")
    for key in medians["sd35-trt"]:
        seconds = [medians[name][key] for name in codes]
        ratio = "" if alone else f"{seconds[0] / seconds[1]:>8.2f}"
        print(f"{key:<24}{''.join(f'{value:>11.3f}' for value in seconds)}{ratio}")
    facts = {"device": device, "medians": medians, "runs": rows, "defaults": defaults}
    out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
