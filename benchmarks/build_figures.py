"""What :mod:`build` measured, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def show(name: str, result: dict[str, Any]) -> Iterator[str]:
    """The table of one model's build."""
    checkpoint = sum(result["checkpoint_bytes"].values())
    yield f"{name}: {checkpoint / 1e9:.1f} GB checkpoint"
    for stage, row in result["build"]["stages"].items():
        yield f"  {stage:<18}{row['seconds']:8.1f} s{row['peak_bytes'] / 1e9:8.2f} GB"
    build, again = result["build"], result["again"]
    transformer = sum(
        row["seconds"]
        for stage, row in build["stages"].items()
        if stage.removesuffix("-plan") in ("conditioner", "denoiser")
    )
    yield f"  {'conditioner and denoiser':<24}{transformer:.1f} s"
    yield f"  {'in all':<18}{build['seconds']:8.1f} s{build['peak_bytes'] / 1e9:8.2f} GB"
    yield f"  {'nothing changed':<18}{again['seconds']:8.1f} s ({result['again_notes']})"


def plot(results: dict[str, Any], path: Path) -> None:
    """Seconds by stage, and peak memory beside the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    models: dict[str, Any] = results.get("models", {})
    for row, result in enumerate(models.values()):
        start = 0.0
        for stage, facts in result["build"]["stages"].items():
            colour = "tab:orange" if stage.endswith("-plan") else "tab:blue"
            left.barh(row, facts["seconds"], left=start, color=colour, edgecolor="white")
            if facts["seconds"] > 0.05 * result["build"]["seconds"]:
                label = stage.removesuffix("-plan")
                left.text(start + facts["seconds"] / 2, row, label, ha="center", rotation=90,
                          va="center", color="white", fontsize=8)  # fmt: skip
            start += facts["seconds"]
    left.set_yticks(range(len(models)), list(models))
    left.set(xlabel="seconds", title="export (blue) and compile (orange), 2 cores, no GPU")
    if peer := results.get("peer"):
        depths = [row["blocks"] for row in peer["rows"]]
        peaks = [row["peak_bytes"] / 1e9 for row in peer["rows"]]
        end = peer["extrapolated"]
        right.plot(depths, peaks, "o", color="tab:red", label="diffusers, modelopt, TensorRT RTX")
        right.plot(
            [depths[0], end["blocks"]], [peaks[0], end["peak_bytes"] / 1e9], ":", color="tab:red",
            label="its line",
        )  # fmt: skip
    if "large" in models:
        mine = max(
            row["peak_bytes"]
            for stage, row in models["large"]["build"]["stages"].items()
            if stage.removesuffix("-plan") in ("conditioner", "denoiser")
        )
        right.plot([38], [mine / 1e9], "s", color="tab:blue", label="sd35-trt build")
    right.axhline(24 * 1.073741824, color="grey", lw=0.8)
    right.text(1, 26.2, "24 GiB", color="grey", fontsize=8)
    right.set(xlabel="blocks of Large's transformer", ylabel="peak anonymous memory, GB")
    right.set(xlim=(0, 40), ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=120)
