"""From a cold process to the first picture: this runtime against diffusers, mini on the CPU.

Each run is a process of its own; the two alternate. Figures are medians, and the ratio is of the
medians of the same session.

    sd35-trt build --gpu cpu --out bundles/mini-cpu
    python benchmarks/startup.py bundles/mini-cpu --out benchmarks/results
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import click

_PROMPT = "a small red circle to the left of a large blue square"

_HEAD = """
import json, sys, time
t0 = time.perf_counter()
"""

_TAIL = """
t3 = time.perf_counter()
print(json.dumps({"import": t1 - t0, "load": t2 - t1, "first image": t3 - t2, "total": t3 - t0}))
"""

_OURS = f"""{_HEAD}
from sd35_trt.runtime import Pipeline
t1 = time.perf_counter()
pipe = Pipeline.load(sys.argv[1])
t2 = time.perf_counter()
pipe({_PROMPT!r}, seed=0)
{_TAIL}"""

_PEER = f"""{_HEAD}
import torch
from diffusers import StableDiffusion3Pipeline
t1 = time.perf_counter()
from sd35_trt.mini import checkpoint_path
pipe = StableDiffusion3Pipeline.from_pretrained(checkpoint_path(), torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
t2 = time.perf_counter()
pipe({_PROMPT!r}, generator=torch.Generator("cpu").manual_seed(0), **json.loads(sys.argv[1]))
{_TAIL}"""


def _run(code: str, argument: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--runs", default=7, show_default=True, help="Counted runs of each, after one more.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"))
def main(bundle: Path, runs: int, out: Path) -> None:
    """Measure, print a table, and write startup.json."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    defaults = manifest["defaults"]
    peer = json.dumps(
        {
            "num_inference_steps": defaults["steps"],
            "guidance_scale": defaults["guidance"],
            "width": defaults["size"][0],
            "height": defaults["size"][1],
            "max_sequence_length": defaults["t5_tokens"],
        }
    )
    rows: dict[str, list[dict[str, float]]] = {"sd35-trt": [], "diffusers": []}
    for i in range(runs + 1):
        for name, code, argument in (
            ("sd35-trt", _OURS, str(bundle)),
            ("diffusers", _PEER, peer),
        ):
            result = _run(code, argument)
            if i:
                rows[name].append(result)
    medians = {
        name: {key: statistics.median(row[key] for row in results) for key in results[0]}
        for name, results in rows.items()
    }
    print(f"{'seconds, median of ' + str(runs):<24}{'sd35-trt':>10}{'diffusers':>11}{'ratio':>8}")
    for key, ours in medians["sd35-trt"].items():
        theirs = medians["diffusers"][key]
        print(f"{key:<24}{ours:>10.3f}{theirs:>11.3f}{ours / theirs:>8.2f}")
    out.mkdir(parents=True, exist_ok=True)
    result = {"medians": medians, "runs": rows, "defaults": defaults}
    (out / "startup.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
