"""Tables for people: what a bundle holds, and what this machine can do."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sd35_trt import __version__
from sd35_trt.backends import BACKENDS, Backend, resolve
from sd35_trt.formats.bundle import Bundle, Manifest, Port
from sd35_trt.store.cache import default_cache_dir
from sd35_trt.targets import Target, choose_builder, present_gpus, targets
from sd35_trt.units import format_bytes, format_memory, format_seconds

if TYPE_CHECKING:
    from sd35_trt.calibration.sensitivity import Sensitivity
    from sd35_trt.export.inventory import LayerEntry
    from sd35_trt.planning.plan import Plan


def _console() -> Console:
    # A pipe has no width: give it one that fits the tables.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _ports(ports: tuple[Port, ...]) -> str:
    short = {"float32": "f32", "float16": "f16", "int64": "i64", "uint8": "u8"}
    return "\n".join(
        f"{p.name} {short.get(p.dtype, p.dtype)} {'×'.join(map(str, p.shape))}" for p in ports
    )


def _target(manifest: Manifest) -> str:
    options = manifest.engine_options
    sm = ", ".join("sm" + c.replace(".", "") for c in manifest.option_names("compute_capabilities"))
    asked = [name.replace("_", " ") for name in ("weight_streaming", "refit") if options.get(name)]
    name = f"{manifest.target} ({sm})" if sm else manifest.target
    return ", ".join([name, f"by {manifest.builder}", *asked])


def print_manifest(bundle: Bundle) -> None:
    """Print a bundle's manifest as tables."""
    m = bundle.manifest
    console = _console()
    facts = Table.grid(padding=(0, 2))
    rows = {
        "bundle": str(bundle.root),
        "model": f"{m.model.name} ({m.model.variant})",
        "target": _target(m),
        "policy": f"{m.policy.name} ({m.policy.sha256[:12]})",
        "calibration": m.calibration[:12] if m.calibration else "none",
        "in FP32": ", ".join(f"{k} (amax {v:.3g})" for k, v in m.fp32_places().items()) or "none",
        "guidance": f"in the graph, default {m.defaults.guidance:g}" if m.guided else "none",
        "batch": f"{m.ranges.batch[0]} to {m.ranges.batch[1]}",
        "size": f"{m.ranges.size[0]} to {m.ranges.size[1]} px in steps of {m.ranges.size_step}, "
        f"default {m.defaults.size[0]}x{m.defaults.size[1]}",
        "steps": f"default {m.defaults.steps}, shift {m.scheduler.shift:g}",
        "text": ", ".join(f"{k} {t.length} tokens" for k, t in m.tokenizers.items()),
        "made": m.created,
        "with": ", ".join(f"{k} {v}" for k, v in m.versions.items()),
        "command": m.command,
    }
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}[/]", value)
    console.print(facts)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    sizes = {"weights": [format_bytes(c.weight_bytes) for c in m.components]}
    if all(c.activation_bytes is not None for c in m.components):
        sizes["working"] = [format_bytes(c.activation_bytes or 0) for c in m.components]
    for column in ("component", *sizes, "inputs", "outputs", "sha256"):
        table.add_column(column, justify="right" if column in sizes else "left")
    for c, *row in zip(m.components, *sizes.values(), strict=True):
        table.add_row(
            c.name, *row, _ports(c.inputs), _ports(c.outputs),
            "\n".join(f.sha256[:12] for f in c.files),
        )  # fmt: skip
    console.print()
    console.print(table)
    total = sum(f.bytes for f in m.all_files())
    console.print(f"\n{len(list(m.all_files()))} files, {format_bytes(total)}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_BUILD_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
# What every session on a GPU needs.
_CUDA = "cuda-bindings"


def _knows_gpus(backend: Backend) -> bool:
    """Whether the library was built with CUDA."""
    if backend.cuda is None:
        return True
    try:
        return resolve(backend.cuda) is not None
    except ImportError:
        return False


def examine() -> dict[str, Any]:
    """What is installed here, and what follows for each target."""
    build = {package: _version(package) for package in _BUILD_PACKAGES}
    missing = [package for package, version in build.items() if version is None]
    gpus, no_gpu = present_gpus()
    found = {}
    for target in targets().values():
        if target.name != target.family:
            continue
        backend = BACKENDS[choose_builder(target)]
        library = next((f"{p} {_version(p)}" for p in backend.packages if _version(p)), None)
        gpu = next((g for g in gpus if g.compute_capability in target.compute_capabilities), None)
        on_cpu = not target.compute_capabilities
        ready = bool(_version(_CUDA)) and gpu is not None and _knows_gpus(backend)
        runs = library is not None and (on_cpu or ready)
        faster = [
            c.extra
            for c in backend.companions
            if {*c.compute_capabilities} & {*target.compute_capabilities}
            and not _version(c.package)
        ]
        notes = []
        if missing:
            notes.append("to build: pip install 'sd35-trt[build]'")
        if library is None:
            notes.append(f"needs: pip install 'sd35-trt[{backend.extra}]'")
        elif gpu is not None and not _version(_CUDA):
            notes.append("to run: pip install 'sd35-trt[cuda]'")
        elif gpu is not None and not ready:
            notes.append("to run: a PyTorch with CUDA, see pytorch.org/get-started")
        elif runs and faster:
            notes.append(f"faster with: pip install 'sd35-trt[{faster[0]}]'")
        # ONNX Runtime compiles when it loads: to build, it is not needed.
        found[target.name] = {
            "builder": backend.name,
            "builds": not missing and (library is not None or not backend.needs_library),
            "runs": runs,
            "runtime": library if runs else None,
            "gpu": gpu.name if gpu else None,
            "note": "; ".join(notes),
        }
    return {
        "sd35-trt": __version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "cache": str(default_cache_dir()),
        "gpus": [asdict(gpu) for gpu in gpus],
        "no gpu": no_gpu,
        "packages": build,
        "targets": found,
    }


def print_findings(findings: dict[str, Any]) -> None:
    """Print what :func:`examine` found."""
    console = _console()
    console.print(
        f"sd35-trt {findings['sd35-trt']}, Python {findings['python']}, "
        f"{findings['cores']} CPU cores, cache in {findings['cache']}"
    )
    packages = ", ".join(f"{k} {v or '[red]missing[/]'}" for k, v in findings["packages"].items())
    console.print(f"to build: {packages}")
    gpus = (
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, "
        f"{format_memory(gpu['memory_bytes'])})"
        for gpu in findings["gpus"]
    )
    console.print(f"GPUs: {', '.join(gpus) or escape(findings['no gpu'])}\n")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("target", "builds here", "runs here", "note"):
        table.add_column(column)
    for name, target in findings["targets"].items():
        why_not = "no" if target["gpu"] or name == "cpu" else "no such GPU"
        table.add_row(
            name,
            f"yes, {target['builder']}" if target["builds"] else "no",
            f"yes, {target['runtime']}" if target["runs"] else why_not,
            escape(target["note"]),
        )
    console.print(table)


def _sm(target: Target) -> str:
    return ", ".join("sm" + c.replace(".", "") for c in target.compute_capabilities)


def print_targets(rows: Sequence[Target]) -> None:
    """Print GPU families, then products."""
    families = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("family", "", "for", "FP8", "FP4", "policy", "also", "builders"):
        families.add_column(column)
    products = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("product", "family", "", "memory", "bandwidth", "bus", "builders"):
        right = column in ("memory", "bandwidth")
        products.add_column(column, justify="right" if right else "left")
    for t in rows:
        if t.memory_bytes is None or t.bandwidth is None or t.bus is None:
            ability = ("yes" if able else "no" for able in (t.fp8, t.fp4))
            also = ", ".join(t.policies[1:])
            families.add_row(
                t.name, _sm(t), t.title, *ability, t.policy, also, ", ".join(t.builders)
            )
        else:
            memory = format_memory(t.memory_bytes)
            speed = f"{t.bandwidth / 1e9:,.0f} GB/s"
            products.add_row(t.name, t.family, _sm(t), memory, speed, t.bus, ", ".join(t.builders))
    console = _console()
    console.print(families)
    console.print()
    console.print(products)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def print_plan(plan: Plan) -> None:
    """Print what a model takes of a GPU's memory, by component and by stage."""
    from sd35_trt.planning.plan import DISK_BANDWIDTH

    data = plan.as_dict()
    console = _console()
    guidance = "guidance" if plan.guided else "no guidance"
    width, height = plan.size
    console.print(
        f"{plan.model} for {plan.target.name}, {plan.policy}, {width}x{height}, "
        f"batch {plan.batch}, {guidance}, {plan.steps} steps\n"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("stage", "component", "weights", "activations", "held", "in memory", "peak"):
        table.add_column(
            column, justify="left" if column in ("stage", "component", "held") else "right"
        )
    for column in ("from disk", "from host"):
        table.add_column(column, justify="right")
    stage = ""
    for c in data["components"]:
        table.add_row(
            "" if c["stage"] == stage else c["stage"],
            c["name"],
            format_bytes(c["weight_bytes"]),
            format_bytes(c["activation_bytes"]),
            c["kind"],
            format_bytes(c["device_bytes"]),
            format_bytes(c["peak_bytes"]),
            _seconds(c["disk_seconds"]),
            _seconds(c["bus_seconds"]),
        )
        stage = c["stage"]
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    fullest = max(data["stages"], key=lambda stage: stage["peak_bytes"])
    per_image = f"{format_bytes(data['bus_bytes_per_image'])} of weights"
    if plan.bus_bandwidth is not None:
        per_image += f" over the bus, {_seconds(data['load_seconds_per_image'])}"
    rows = {
        "weights": f"{format_bytes(data['weight_bytes'])}, of which "
        f"{format_bytes(data['resident_bytes'])} stay in memory",
        "peak": f"{format_bytes(data['peak_bytes'])}, {fullest['name']}",
        "first load": f"{_seconds(data['first_load_seconds'])} from a disk of "
        f"{DISK_BANDWIDTH / 1e9:g} GB/s",
        "per picture": per_image,
        "verdict": plan.verdict,
    }
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}[/]", value)
    console.print()
    console.print(facts)


def print_inventory(entries: Sequence[LayerEntry]) -> None:
    """Print every linear with its precision, rule and bytes; layers that differ only in their
    numbers share a line, and other layers are summed up by component and precision."""
    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("component", "linear", "n", "in×out", "precision", "bytes", "rule"):
        table.add_column(column, justify="right" if column in ("n", "bytes") else "left")
    groups: dict[tuple[str, ...], list[LayerEntry]] = {}
    for e in entries:
        pattern = re.sub(r"\b\d+\b", "N", e.layer, count=1) if e.linear else "other layers"
        shape = ("×".join(map(str, e.shape)) or "Q·Kᵀ, P·V") if e.linear else ""
        key = (e.component, pattern, shape, e.precision, e.rule if e.linear else "")
        groups.setdefault(key, []).append(e)
    for (component, pattern, shape, kind, rule), members in groups.items():
        size = format_bytes(sum(e.bytes for e in members))
        table.add_row(component, pattern, str(len(members)), shape, kind, size, rule)
    console.print(table)
    console.print()
    totals = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("precision", "layers", "bytes"):
        totals.add_column(column, justify="left" if column == "precision" else "right")
    for precision in dict.fromkeys(e.precision for e in entries):
        members = [e for e in entries if e.precision == precision]
        totals.add_row(precision, str(len(members)), format_bytes(sum(e.bytes for e in members)))
    totals.add_row("all", str(len(entries)), format_bytes(sum(e.bytes for e in entries)))
    console.print(totals)


def print_quality(report: Mapping[str, Any], page: str) -> None:
    """Print the main figures of a comparison; see :mod:`sd35_trt.quality.compare`."""
    images, final, run = report["images"], report["latents"]["final"], report["run"]
    psnr, ssim, lpips = images["psnr"], images["ssim"], images["lpips"]

    def decibels(value: float | None) -> str:
        return "∞" if value is None else f"{value:.1f}"

    console = _console()
    facts = Table.grid(padding=(0, 2))
    rows = {
        "pictures": f"{run['images']} pairs, {run['steps']} steps, {run['prompts']}",
        "latent error": f"{final['mean']:.3g} mean, {final['median']:.3g} median, "
        f"{final['max']:.3g} largest",
        "PSNR": f"{decibels(psnr['all'])} dB, {decibels(psnr['median'])} median, "
        f"{decibels(psnr['worst'])} worst",
        "SSIM": f"{ssim['mean']:.3f} mean, {ssim['median']:.3f} median, {ssim['worst']:.3f} worst",
        "LPIPS": f"{lpips['mean']:.3g} mean, {lpips['worst']:.3g} worst"
        if lpips
        else f"not available: {images['lpips_note']}",
    }
    quantized = [row for row in report["linears"] if row["precision"] not in ("half", "fp32")]
    if quantized:
        worst = max(
            quantized, key=lambda row: math.inf if row["own_error"] is None else row["own_error"]
        )
        error = "not finite" if worst["own_error"] is None else f"{worst['own_error']:.3g}"
        rows["layers"] = (
            f"{len(quantized)} quantized linears, the worst {error}: "
            f"{worst['component']}/{worst['layer']}"
        )
    if report["scenes"]:
        whole = report["scenes"]["whole"]
        paired = whole["paired"]
        rows["scenes right"] = (
            f"{100 * whole['candidate']['value']:.1f} %, reference "
            f"{100 * whole['reference']['value']:.1f} %, difference "
            f"{100 * paired['difference']:+.1f} points "
            f"({100 * paired['low']:+.1f} to {100 * paired['high']:+.1f})"
        )
    rows["report"] = f"{page}, in {report['seconds']:.0f} s"
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}[/]", value)
    console.print(facts)


#: Rows of a benchmark's table: the stage's key in the result, and its name.
_STAGES = {
    "text": "text",
    "conditioning": "conditioning",
    "denoise": "denoising",
    "loop": "the loop, both",
    "step": "one step",
    "decode": "decoding",
    "total": "end to end",
}


def print_bench(result: Mapping[str, Any]) -> None:
    """Print a benchmark's figures, with those of the peer beside them; see :mod:`.bench`."""
    console = _console()
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
    device = result["device"]["name"] if s["device"] != "cpu" else result["host"]["cpu"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k != "python")
    console.print(f"{device}, {s['threads']} CPU threads\n{versions}\n")

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
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
    for key, name in _STAGES.items():
        cells = [name]
        for side in sides:
            spread = side["step"] if key == "step" else side["stages"][key]
            if spread is None:
                cells += ["–", ""]
            else:
                ends = [format_seconds(spread[end]) for end in ("p10", "p90")]
                cells += [format_seconds(spread["median"]), " – ".join(ends)]
        if ratios is not None:
            found = ratios.get(key)
            cells += [_ratio(found and found["ratio"])]
            cells += [f"{found['p10']:.2f} – {found['p90']:.2f}" if found else ""]
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
            known = all(counts)
            yield row(
                name + suffix,
                ["–" if count is None else format_bytes(count) for count in counts],
                counts[0] / counts[-1] if known else None,
            )
    energies = [side["joules_per_image"] for side in sides]
    yield row(
        "energy per image",
        ["–" if joules is None else f"{joules:.3g} J" for joules in energies],
        energies[0] / energies[-1] if all(energies) else None,
    )


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def print_sensitivity(result: Sensitivity) -> None:
    """Print each group's error alone against the bytes it saves, the worst per byte first."""
    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("group", "linears", "error alone", "saves", "kept"):
        table.add_column(column, justify="left" if column in ("group", "kept") else "right")
    rows = zip(result.groups, result.errors, strict=True)
    for group, error in sorted(rows, key=lambda row: -(row[1] ** 2) / row[0].saved_bytes):
        kept = result.half is not None and group in result.half
        saved = format_bytes(group.saved_bytes)
        count = str(len(group.layers))
        table.add_row(group.name, count, f"{error:.5f}", saved, "half" if kept else "")
    console.print(table)
    smallest = sum(group.fp8_bytes for group in result.groups)
    largest = sum(group.half_bytes for group in result.groups)
    console.print(f"\nall in FP8: error {result.everything:.5f}, {format_bytes(smallest)}")
    console.print(f"none in FP8: {format_bytes(largest)}")
    size = format_bytes(result.base_bytes)
    console.print(f"the policy given: error {result.base:.5f}, {size}")
    if result.chosen is not None and result.chosen_bytes is not None:
        size = format_bytes(result.chosen_bytes)
        console.print(f"within the budget: error {result.chosen:.5f}, {size}")
