"""How fast a bundle draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd35_trt.units import format_bytes, format_seconds

from .console import open_console, plain_table

#: Rows of the table: the stage's key in the result, and its name.
_ROWS = {
    "text": "text",
    "conditioning": "conditioning",
    "denoise": "denoising",
    "loop": "the loop, both",
    "step": "one step",
    "decode": "decoding",
    "total": "end to end",
}


def print_bench(result: Mapping[str, Any]) -> None:
    """Print a benchmark's figures, with those of the peer beside them.

    Args:
        result: of :func:`sd35_trt.bench.run.bench`.
    """
    console = open_console()
    s, bundle, peer = result["settings"], result["bundle"], result["peer"]
    guidance = f"guidance {s['guidance']:g}" if s["guidance"] != 1 else "no guidance"
    console.print(
        f"{bundle['path']}: {bundle['model']}, {bundle['policy']}, for {bundle['target']} by "
        f"{bundle['builder']}"
    )
    if peer:
        what = f"in {peer['dtype']}" if peer["kind"] != "bundle" else peer["policy"]
        console.print(f"against {_short(peer)}, {what}")
    console.print(
        f"{s['size'][0]}x{s['size'][1]}, batch {s['batch']}, {s['steps']} steps, {guidance}; "
        f"{s['runs']} runs after {s['warmup']}"
    )
    if bundle["short_steps"]:
        console.print(f"{bundle['short_steps']} of {s['steps']} steps are short")
    device = result["device"]["name"] if s["device"] != "cpu" else result["host"]["cpu"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k != "python")
    console.print(f"{device}, {s['threads']} CPU threads\n{versions}\n")

    table = plain_table([""])
    for side in (bundle, peer) if peer else (bundle,):
        table.add_column(_short(side), justify="right")
        table.add_column("middle 80 %", justify="right")
    if peer:
        table.add_column("ratio", justify="right")
        table.add_column("middle 80 %", justify="right")
    for cells in _bench_rows(result):
        table.add_row(*cells)
    console.print(table)
    if result["comparison"]:
        alike = result["comparison"]
        both, seeds = (
            "identical" if alike[key] is None else f"PSNR {alike[key]:.1f} dB"
            for key in ("psnr_db", "psnr_of_two_seeds_db")
        )
        console.print(
            f"\nratio: {_short(bundle)} / {_short(peer)}; the last pictures of both: {both} "
            f"(of two seeds: {seeds})"
        )


def _short(side: Mapping[str, Any]) -> str:
    return Path(side["path"]).name if side["kind"] == "bundle" else side["kind"]


def _bench_rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Name, then value and spread of each side, then ratio and spread."""
    sides = [result["bundle"]] + ([result["peer"]] if result["peer"] else [])
    ratios = result["comparison"]["ratios"] if result["comparison"] else None

    def row(name: str, values: Sequence[str], ratio: float | None = None) -> list[str]:
        cells = [name, *(cell for value in values for cell in (value, ""))]
        return cells if ratios is None else [*cells, _ratio(ratio), ""]

    loads = [format_seconds(side["load_seconds"]) for side in sides]
    yield row("loading", loads, ratios and ratios["load"]["ratio"])
    firsts = [side["first_seconds"] for side in sides]
    yield row("first run", [format_seconds(first) for first in firsts], firsts[0] / firsts[-1])
    for key, name in _ROWS.items():
        cells = [name]
        for side in sides:
            spread = side["step"] if key == "step" else side["stages"][key]
            if spread is None:
                cells += ["–", ""]
            else:
                ends = [format_seconds(spread[end]) for end in ("p10", "p90")]
                cells += [format_seconds(spread["median"]), " – ".join(ends)]
        if ratios is not None:
            spread = ratios.get(key)
            cells += [_ratio(spread and spread["ratio"])]
            cells += [f"{spread['p10']:.2f} – {spread['p90']:.2f}" if spread else ""]
        yield cells
    speeds = [side["images_per_second"] for side in sides]
    yield row("images per second", [f"{speed:.3g}" for speed in speeds], speeds[0] / speeds[-1])
    for place, name in (("host", "memory"), ("device", "GPU memory")):
        if sides[0]["memory"][place] is None:
            continue
        for figure, suffix in (("peak_bytes", ", peak"), ("own_bytes", ", added")):
            counts = [side["memory"][place][figure] for side in sides]
            if figure == "peak_bytes":  # the peer's is with the bundle loaded too
                counts[1:] = [None] * len(counts[1:])
            comparable = all(counts)
            yield row(
                name + suffix,
                ["–" if count is None else format_bytes(count) for count in counts],
                counts[0] / counts[-1] if comparable else None,
            )
    energies = [side["joules_per_image"] for side in sides]
    yield row(
        "energy per image",
        ["–" if joules is None else f"{joules:.3g} J" for joules in energies],
        energies[0] / energies[-1] if all(energies) else None,
    )


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
