"""Random models of SD3.5's exact size compiled for Ada without a GPU: time, memory, and damage.

    python benchmarks/build.py --model large --model medium --peer 2,3,4 --flips 1000 --work /tmp

Every build runs in a process of its own whose anonymous memory is sampled. The peer is the usual
way on the same weights: the diffusers model in memory, modelopt's default FP8 configuration,
``torch.onnx.export``, TensorRT for RTX; its line is drawn through the depths that are asked for.
Large takes 75 GB of disk while it runs. Calibrations are made up: they change no time and no byte.
A part measured before keeps its figures in the result unless it is measured again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

ADA = "8.9"
RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"

_OURS = """
import json, sys, time
from pathlib import Path
from sd35_trt.build import BuildOptions, build
def progress(stage, done, total, note):
    print(json.dumps([time.time(), stage, note]), flush=True)
model, calibration, out, cache = sys.argv[1:5]
size = tuple(map(int, sys.argv[5:7])) or None
build(
    BuildOptions(
        model=model, target="ada", policy="fp8", size=size, out=Path(out), cache_dir=Path(cache),
        calibration=Path(calibration) if calibration else None,
    ),
    progress,
)
"""

_CALIBRATION = """
import sys
from pathlib import Path
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.components import COMPONENTS
from sd35_trt.export.component import fp8_layers
from sd35_trt.formats.bundle import sha256_file
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.policies import load_policy
from sd35_trt.store.replacement import write_directory
root, out = map(Path, sys.argv[1:])
layers, _ = fp8_layers(Checkpoint(root), COMPONENTS, load_policy("fp8"))
files = {str(p.relative_to(root)): sha256_file(p) for p in root.glob("*/*") if p.is_file()}
provenance = Provenance(variant="random", files=files)
calibration = Calibration(dict.fromkeys(layers, 8.0), {}, {}, provenance)
write_directory(out, "calibration.json", calibration.files())
"""

# Latents of 512 to 1536 pixels, text of 154 to 589 tokens, guidance: as our denoiser's ranges.
_PEER = """
import json, sys, time
from pathlib import Path
import modelopt.torch.quantization as mtq
import tensorrt_rtx as trt
import torch
from diffusers import SD3Transformer2DModel
def mark(stage):
    print(json.dumps([time.time(), stage, ""]), flush=True)
root, out = sys.argv[1:]
mark("load")
model = SD3Transformer2DModel.from_pretrained(
    root, subfolder="transformer", torch_dtype=torch.float16
).eval()
g = torch.Generator().manual_seed(0)
shapes = {
    "hidden_states": [(2, 16, 64, 64), (2, 16, 128, 128), (2, 16, 192, 192)],
    "encoder_hidden_states": [(2, 154, 4096), (2, 333, 4096), (2, 589, 4096)],
    "pooled_projections": [(2, 2048)] * 3,
    "timestep": [(2,)] * 3,
}
inputs = {name: torch.randn(s[0], generator=g).half() for name, s in shapes.items()}
with torch.no_grad():
    mark("quantize")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(**inputs))
    mark("export")
    torch.onnx.export(
        model, (), out + "/model.onnx", kwargs={**inputs, "return_dict": False},
        input_names=list(inputs), output_names=["sample"], opset_version=20, dynamo=False,
        dynamic_axes={"hidden_states": {2: "h", 3: "w"}, "encoder_hidden_states": {1: "t"}},
    )
del model, inputs
mark("compile")
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
assert parser.parse_from_file(out + "/model.onnx"), parser.get_error(0).desc()
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
profile = builder.create_optimization_profile()
for name, sizes in shapes.items():
    profile.set_shape(name, *sizes)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
Path(out, "engine.plan").write_bytes(plan)
mark("done")
"""


def anonymous_bytes(pid: int) -> int:
    """A process's memory that no file backs."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def run(script: str, *arguments: str | Path) -> dict[str, Any]:
    """A script in a process of its own, which prints [time, stage, note] where a stage begins.

    Returns:
        ``seconds``, ``peak_bytes``, and by stage: the same, and the notes it ended with.
    """
    start = time.time()
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    samples: list[tuple[float, int]] = []

    def watch() -> None:
        while child.poll() is None:
            samples.append((time.time(), anonymous_bytes(child.pid)))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = child.communicate()
    end = time.time()
    watcher.join()
    if child.returncode:
        raise click.ClickException(
            f"a build failed with status {child.returncode}: {errors.strip().splitlines()[-1]}"
        )
    begins: dict[str, float] = {}
    notes: dict[str, str] = {}
    for line in output.splitlines():
        if line.startswith("["):
            when, stage, note = json.loads(line)
            begins.setdefault(stage, when)
            notes[stage] = note
    ends = [*list(begins.values())[1:], end][: len(begins)]
    stages = {
        stage: {
            "seconds": stop - begin,
            "peak_bytes": max((b for t, b in samples if begin <= t <= stop), default=0),
            "note": notes[stage],
        }
        for (stage, begin), stop in zip(begins.items(), ends, strict=True)
    }
    peak = max(bytes_ for _, bytes_ in samples)
    return {"seconds": end - start, "peak_bytes": peak, "stages": stages}


def build_model(name: str, blocks: int | None, work: Path) -> dict[str, Any]:
    """Write a random checkpoint, build it for Ada, and build it again with nothing changed."""
    from random_checkpoint import write_checkpoint

    from sd35_trt.formats.bundle import Bundle

    sizes = write_checkpoint(work / "model", name, blocks)
    run(_CALIBRATION, work / "model", work / "calibration")
    arguments = work / "model", work / "calibration", work / "bundle", work / "cache"
    first = run(_OURS, *arguments)
    again = run(_OURS, *arguments)
    manifest = Bundle.open(work / "bundle").manifest
    plans = {
        c.name: {
            "weight_bytes": c.weight_bytes,
            "activation_bytes": c.activation_bytes,
            "file_bytes": sum(f.bytes for f in c.files),
        }
        for c in manifest.components
    }
    return {
        "checkpoint_bytes": sizes,
        "build": first,
        "again": {k: again[k] for k in ("seconds", "peak_bytes")},
        "again_notes": sorted({s["note"] for s in again["stages"].values()}),
        "components": plans,
    }


def predict(name: str, work: Path) -> dict[str, int]:
    """What ``plan --exact`` expects of the engines that :func:`build_model` builds."""
    from sd35_trt.checkpoints.structure import Structure
    from sd35_trt.components import COMPONENTS
    from sd35_trt.dimensions import Defaults, Ranges, dimension_bounds
    from sd35_trt.export.component import ExportOptions
    from sd35_trt.planning.working_memory import compiled_activations
    from sd35_trt.policies import load_policy
    from sd35_trt.store.cache import StageCache
    from sd35_trt.targets import find_target
    from sd35_trt.variants import VARIANTS

    variant = next(v for v in VARIANTS if v.name == name)
    tokens = 32  # both tokenizers are mini's
    ranges = Ranges((1, 4), (512, 1536), 64, t5_tokens=(tokens, 512))
    defaults = Defaults(variant.steps, variant.guidance, variant.size, "euler", tokens)
    options = ExportOptions(tokens)
    return {
        component: compiled_activations(
            component,
            Structure(name),
            load_policy("fp8"),
            options,
            dimension_bounds(component, ranges, defaults, tokens, options.guided),
            find_target("ada"),
            StageCache(work / "cache"),
        )
        for component in COMPONENTS
    }


def build_peer(depths: list[int], work: Path) -> dict[str, Any]:
    """The usual way with the transformer alone, at some depths, and the line through them."""
    from random_checkpoint import LARGE, write_transformer

    rows = []
    for depth in depths:
        size = write_transformer(work / f"peer{depth}", {**LARGE, "num_layers": depth})
        (work / f"out{depth}").mkdir()
        row = run(_PEER, work / f"peer{depth}", work / f"out{depth}")
        shutil.rmtree(work / f"peer{depth}")
        shutil.rmtree(work / f"out{depth}")
        rows.append({"blocks": depth, "checkpoint_bytes": size, **row})
        print(f"peer, {depth} blocks: {row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.2f} GB")
    whole = LARGE["num_layers"]
    extrapolated = {
        key: float(np.polyval(np.polyfit(depths, [row[key] for row in rows], 1), whole))
        for key in ("seconds", "peak_bytes")
    }
    return {"rows": rows, "extrapolated": {"blocks": whole, **extrapolated}}


def change_size(work: Path) -> dict[str, Any]:
    """mini, then mini for another size range: which stages run."""
    first = run(_OURS, "mini", "", work / "mini", work / "mini-cache")
    again = run(_OURS, "mini", "", work / "mini", work / "mini-cache")
    other = run(_OURS, "mini", "", work / "mini-other", work / "mini-cache", "128", "256")
    return {
        "first_seconds": first["seconds"],
        "unchanged_seconds": again["seconds"],
        "other_size_seconds": other["seconds"],
        "other_size_ran": [k for k, s in other["stages"].items() if s["note"] != "unchanged"],
    }


def flip_bits(bundle: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Flip one bit of one file at a time, and see what ``verify`` and a load say.

    Every file is as likely to be hit as any other.
    """
    from sd35_trt.errors import Sd35Error
    from sd35_trt.formats.bundle import Bundle
    from sd35_trt.runtime import Pipeline

    generator = random.Random(seed)
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    missed, crashed = [], []
    with click.progressbar(range(count), label="bit flips") as bar:
        for _ in bar:
            path = generator.choice(files)
            position, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
            _flip(path, position, bit)
            where = f"{path.relative_to(bundle)}:{position}.{bit}"
            try:
                Bundle.open(bundle, verify=True)
                missed.append(where)
            except Sd35Error:
                pass  # as it should
            try:
                Pipeline.load(bundle).close()
            except Sd35Error:
                pass  # small files are checked at every load
            except Exception as error:  # noqa: BLE001 (what must not happen is what is counted)
                crashed.append(f"{where}: {error!r}")
            _flip(path, position, bit)
    Bundle.open(bundle, verify=True)
    return {"flips": count, "files": len(files), "missed": missed, "crashed": crashed}


def _flip(path: Path, position: int, bit: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


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


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(["large", "medium"]))
@click.option("--blocks", type=int, help="Fewer blocks of the transformer and T5, to try it out.")
@click.option("--peer", "peer", default="", help="Depths for the peer, e.g. 2,3,4.")
@click.option("--mini", is_flag=True, help="Rebuild mini with another size range.")
@click.option("--predict", "predicted", is_flag=True, help="Working memory, by plan --exact.")
@click.option("--flips", type=int, default=0, help="Bit flips over a bundle of mini.")
@click.option("--work", type=click.Path(path_type=Path), help="Where to write checkpoints.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(
    models: tuple[str, ...],
    blocks: int | None,
    peer: str,
    mini: bool,
    predicted: bool,
    flips: int,
    work: Path | None,
    out: Path,
) -> None:
    """Measure, print a table, and write build.json and build.png (by default in docs/images)."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "build.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    results["cores"] = os.cpu_count()

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        plot(results, (IMAGES if out == RESULTS else out) / "build.png")

    for name in models:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            result = build_model(name, blocks, Path(folder))
        results.setdefault("models", {})[name] = result
        print("\n".join(show(name, result)), flush=True)
        keep()
    if peer:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            results["peer"] = build_peer([int(d) for d in peer.split(",")], Path(folder))
        end = results["peer"]["extrapolated"]
        print(
            f"the peer's line at {end['blocks']} blocks: {end['seconds']:.0f} s, "
            f"{end['peak_bytes'] / 1e9:.0f} GB"
        )
        keep()
    if mini:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            results["mini"] = change_size(Path(folder))
        print(json.dumps(results["mini"], indent=1))
        keep()
    for name, result in results.get("models", {}).items() if predicted else ():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            found = predict(name, Path(folder))
        for component, built in result["components"].items():
            built["predicted_activation_bytes"] = found[component]
            ratio = found[component] / built["activation_bytes"]
            print(
                f"{name:<8}{component:<14}{found[component]:15,}"
                f"{built['activation_bytes']:15,} {ratio:6.3f}"
            )
        keep()
    if flips:
        from sd35_trt.build import BuildOptions, build

        with tempfile.TemporaryDirectory(dir=work) as folder:
            bundle = build(BuildOptions(out=Path(folder) / "mini"))
            results["flips"] = flip_bits(bundle, flips)
        found = results["flips"]
        print(
            f"{found['flips']} flips over {found['files']} files: {len(found['missed'])} missed, "
            f"{len(found['crashed'])} crashed the load"
        )
        keep()


if __name__ == "__main__":
    main()
