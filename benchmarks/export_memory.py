"""Peak anonymous memory of exporting SD3.5 Large's transformer, against its size.

Writes random checkpoints of growing depth at full width (2432) and exports conditioner and
denoiser of each in a process of its own, whose anonymous memory is sampled. The line should be
flat: the exporter traces without weights and converts (and quantizes) one tensor at a time.

    python benchmarks/export_memory.py --policy half --policy fp8 --work /tmp

A policy measured before keeps its rows in the result unless it is measured again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"

_CHILD = """
import sys, time
from pathlib import Path
from sd35_trt.export.checkpoint import Checkpoint
from sd35_trt.export.component import ExportOptions, export_component, fp8_layers
from sd35_trt.export.scales import Scales
from sd35_trt.policy import load_policy
checkpoint, out, policy = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), load_policy(sys.argv[3])
# Any amax will do: only the bytes written depend on it.
linears, _ = fp8_layers(checkpoint, ["denoiser"], policy)
scales = Scales(inputs=dict.fromkeys(linears, 8.0))
for name in ("conditioner", "denoiser"):
    start, marks = time.perf_counter(), {}
    def progress(fraction, note):
        marks.setdefault(note, time.perf_counter())
    (out / name).mkdir(parents=True)
    options = ExportOptions(clip_tokens=77)
    export_component(name, checkpoint, policy, options, out / name, progress, scales)
    end = time.perf_counter()
    print(name, marks["writing weights"] - start, end - marks["writing weights"], flush=True)
"""


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(checkpoint: Path, out: Path, policy: str) -> dict[str, Any]:
    """Export in a child process; peak anonymous bytes, seconds by stage, bytes written."""
    command = [sys.executable, "-c", _CHILD, str(checkpoint), str(out), policy]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        try:
            peak = max(peak, _anonymous_bytes(child.pid))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.02)
    output = child.communicate()[0]
    if child.returncode:
        raise click.ClickException(f"the export failed with status {child.returncode}")
    stages = {}
    for line in output.splitlines():
        name, tracing, writing = line.split()
        stages[name] = {"trace_s": float(tracing), "write_s": float(writing)}
    sizes = {f.name: sum(path.stat().st_size for path in f.iterdir()) for f in out.iterdir()}
    return {
        "peak_anonymous_bytes": peak,
        "seconds": time.perf_counter() - start,
        "stages": stages,
        "written_bytes": sum(sizes.values()),
        "denoiser_bytes": sizes["denoiser"],
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory against checkpoint bytes, with the checkpoint itself for scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        x = [row["checkpoint_bytes"] / 1e9 for row in own]
        y = [row["peak_anonymous_bytes"] / 1e9 for row in own]
        axes.plot(x, y, "o-", label=f"peak anonymous memory, {policy}")
    x = sorted({row["checkpoint_bytes"] / 1e9 for row in rows})
    axes.plot(x, x, ":", color="grey", label="the checkpoint itself")
    axes.set(xlabel="checkpoint, GB (BF16)", ylabel="GB", ylim=(0, None))
    axes.set_title("Exporting the SD3.5 Large transformer, 2 to 38 blocks")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--depths", default="2,6,12,24,38", show_default=True, help="Numbers of blocks.")
@click.option("--policy", "policies", multiple=True, default=["half"], show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=None,
    help="Where to write checkpoints and exports: 32 GB for 38 blocks.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(depths: str, policies: tuple[str, ...], work: Path | None, out: Path) -> None:
    """Measure, print a table, and write export_memory.json and .png (by default in docs/images)."""
    from random_checkpoint import LARGE, write_transformer

    result = out / "export_memory.json"
    rows = json.loads(result.read_text())["rows"] if result.is_file() else []
    rows = [row for row in rows if row["policy"] not in policies]
    print("policy  blocks  checkpoint  denoiser  peak anonymous  trace   write   total")
    for depth in map(int, depths.split(",")):
        folder = Path(tempfile.mkdtemp(dir=work))
        try:
            size = write_transformer(folder / "model", {**LARGE, "num_layers": depth})
            for policy in policies:
                row = measure(folder / "model", folder / policy, policy)
                shutil.rmtree(folder / policy)
                row = {"policy": policy, "blocks": depth, "checkpoint_bytes": size, **row}
                rows.append(row)
                _print(row)
        finally:
            shutil.rmtree(folder)
    rows.sort(key=lambda row: (row["policy"], row["blocks"]))
    out.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    plot(rows, (IMAGES if out == RESULTS else out) / "export_memory.png")


def _print(row: dict[str, Any]) -> None:
    trace = sum(s["trace_s"] for s in row["stages"].values())
    write = sum(s["write_s"] for s in row["stages"].values())
    print(
        f"{row['policy']:<6}  {row['blocks']:>6}  {row['checkpoint_bytes'] / 1e9:>7.2f} GB"
        f"  {row['denoiser_bytes'] / 1e9:>5.2f} GB"
        f"  {row['peak_anonymous_bytes'] / 1e9:>11.2f} GB"
        f"  {trace:>4.0f} s  {write:>4.0f} s  {row['seconds']:>4.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
