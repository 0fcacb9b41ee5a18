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
import tempfile
from pathlib import Path
from typing import Any

import click
from child import run_child

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def measure(checkpoint: Path, out: Path, policy: str) -> dict[str, Any]:
    """Export in a child process; peak anonymous bytes, seconds by stage, bytes written."""
    export = run_child("transformer_export.py", checkpoint, out, policy)
    seconds = {stage: row["seconds"] for stage, row in export["stages"].items()}
    stages = {
        name: {
            "trace_s": seconds[f"{name} tracing"],
            "write_s": seconds[f"{name} writing weights"],
        }
        for name in ("conditioner", "denoiser")
    }
    sizes = {f.name: sum(path.stat().st_size for path in f.iterdir()) for f in out.iterdir()}
    return {
        "peak_anonymous_bytes": export["peak_bytes"],
        "seconds": export["seconds"],
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
    for directory in (work, out):
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
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
