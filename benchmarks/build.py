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
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from build_figures import plot, show
from child import run_child

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def build_model(name: str, blocks: int | None, work: Path) -> dict[str, Any]:
    """Write a random checkpoint, build it for Ada, and build it again with nothing changed."""
    from random_checkpoint import write_checkpoint

    from sd35_trt.formats.bundle import Bundle

    sizes = write_checkpoint(work / "model", name, blocks)
    run_child("made_up_calibration.py", work / "model", work / "calibration")
    arguments = work / "model", work / "calibration", work / "bundle", work / "cache"
    first = run_child("ada_build.py", *arguments)
    again = run_child("ada_build.py", *arguments)
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
        row = run_child("peer_build.py", work / f"peer{depth}", work / f"out{depth}")
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
    first = run_child("ada_build.py", "mini", "", work / "mini", work / "mini-cache")
    again = run_child("ada_build.py", "mini", "", work / "mini", work / "mini-cache")
    other = run_child(
        "ada_build.py", "mini", "", work / "mini-other", work / "mini-cache", "128", "256"
    )
    return {
        "first_seconds": first["seconds"],
        "unchanged_seconds": again["seconds"],
        "other_size_seconds": other["seconds"],
        "other_size_ran": [k for k, s in other["stages"].items() if s["note"] != "unchanged"],
    }


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

    def write() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        plot(results, (IMAGES if out == RESULTS else out) / "build.png")

    for name in models:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            result = build_model(name, blocks, Path(folder))
        results.setdefault("models", {})[name] = result
        print("\n".join(show(name, result)), flush=True)
        write()
    if peer:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            results["peer"] = build_peer([int(d) for d in peer.split(",")], Path(folder))
        end = results["peer"]["extrapolated"]
        print(
            f"the peer's line at {end['blocks']} blocks: {end['seconds']:.0f} s, "
            f"{end['peak_bytes'] / 1e9:.0f} GB"
        )
        write()
    if mini:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            results["mini"] = change_size(Path(folder))
        print(json.dumps(results["mini"], indent=1))
        write()
    for name, result in results.get("models", {}).items() if predicted else ():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            activations = predict(name, Path(folder))
        for component, engine in result["components"].items():
            engine["predicted_activation_bytes"] = activations[component]
            ratio = activations[component] / engine["activation_bytes"]
            print(
                f"{name:<8}{component:<14}{activations[component]:15,}"
                f"{engine['activation_bytes']:15,} {ratio:6.3f}"
            )
        write()
    if flips:
        from flips import flip_bits

        from sd35_trt.build import BuildOptions, build

        with tempfile.TemporaryDirectory(dir=work) as folder:
            bundle = build(BuildOptions(out=Path(folder) / "mini"))
            results["flips"] = flip_bits(bundle, flips)
        counts = results["flips"]
        print(
            f"{counts['flips']} flips over {counts['files']} files: "
            f"{len(counts['missed'])} missed, {len(counts['crashed'])} crashed the load"
        )
        write()


if __name__ == "__main__":
    main()
