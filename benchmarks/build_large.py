"""SD3.5 Large compiled for Ada without a GPU: wall time and peak memory of every stage.

    python benchmarks/build_large.py [--blocks 38] [--folder DIR]

Writes a random transformer of Large's exact structure in BF16 (16 GB), exports conditioner and
denoiser with the ``fp8`` policy, and compiles both for sm89 with TensorRT for RTX; then prints a
table and writes it as JSON. Scales are made up: they change no time and no byte. About 45 GB of
disk are used and freed again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_checkpoint import LARGE, write_transformer
from safetensors.torch import load_file, save_file

from sd35_trt.bundle import Ranges
from sd35_trt.cache import StageCache
from sd35_trt.calibration_file import Calibration
from sd35_trt.dimensions import dimension_bounds
from sd35_trt.engines.builder import ExportedComponent, load_builder
from sd35_trt.engines.tensorrt_plan import read_header
from sd35_trt.export.checkpoint import Checkpoint
from sd35_trt.export.component import ExportOptions, export_component, fp8_layers
from sd35_trt.export.scales import Scales
from sd35_trt.policy import load_policy
from sd35_trt.stages import Stage, run_stage

_SHARD = "diffusion_pytorch_model-block-"

RESULTS = Path(__file__).parent / "results" / "build_large.json"


class Meter:
    """Wall time and peak anonymous memory of a block, of this process."""

    def __enter__(self) -> Meter:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            status = Path("/proc/self/status").read_text("ascii")
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            assert found is not None
            self.peak = max(self.peak, int(found[1]) * 1024)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()


def write_blocks(model: Path, blocks: int) -> int:
    """A random transformer; the blocks between first and last hold the first one's rows, rolled.

    Drawing 8 billion numbers would take longer than all that is measured.
    """
    config = {**LARGE, "num_layers": blocks}
    write_transformer(model, {**LARGE, "num_layers": 2})
    folder = model / "transformer"
    (folder / "config.json").write_text(json.dumps(config))
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_file.read_text("utf-8"))["weight_map"]
    found = {number: load_file(folder / f"{_SHARD}{number:02d}.safetensors") for number in (0, 1)}
    for block in range(blocks):
        source = 1 if block == blocks - 1 else 0
        prefix = f"transformer_blocks.{block}."
        tensors = {
            prefix + name.split(".", 2)[2]: tensor.roll(block, 0)
            for name, tensor in found[source].items()
        }
        file = f"{_SHARD}{block:02d}.safetensors"
        save_file(tensors, folder / f"{file}.new")
        (folder / f"{file}.new").rename(folder / file)
        index = {k: v for k, v in index.items() if not k.startswith(prefix)}
        index |= dict.fromkeys(tensors, file)
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, blocks: int) -> dict[str, Any]:
    """Run the stages in ``folder``; returns what the table shows."""
    rows = []

    def stage(name: str, run: Callable[[], Any]) -> Any:
        with Meter() as meter:
            result = run()
        rows.append({"stage": name, "seconds": meter.seconds, "peak_bytes": meter.peak})
        print(f"{name:<22}{meter.seconds:8.1f} s{meter.peak / 1e9:8.2f} GB", flush=True)
        return result

    model = folder / "model"
    total = stage("write checkpoint", lambda: write_blocks(model, blocks))
    checkpoint, policy, cache = Checkpoint(model), load_policy("fp8"), StageCache(folder / "cache")
    linears, _ = fp8_layers(checkpoint, ["conditioner", "denoiser"], policy)
    calibration = Calibration(dict.fromkeys(linears, 8.0), {}, {}, {"files": {}})
    scales = Scales.of(calibration, "transformer")
    ranges = Ranges((1, 4), (512, 1536), 64, (77, 512))
    defaults = {"steps": 28, "size": [1024, 1024], "t5_tokens": 256}
    builder = load_builder("tensorrt-rtx", ("8.9",))
    components = []
    for name in ("conditioner", "denoiser"):

        def export(out: Path, progress: Any, name: str = name) -> None:
            options = ExportOptions(clip_tokens=77)
            export_component(name, checkpoint, policy, options, out, progress, scales)

        exporting = Stage(name, {}, export)
        exported = ExportedComponent.read(
            stage(f"export {name}", lambda s=exporting: run_stage(cache, s, lambda *_: None))
        )
        bounds = dimension_bounds(name, ranges, defaults, 77, guided=True)
        used = {d: bounds[d] for port in exported.inputs for d in port.dynamic}
        compiling = builder.stage(exported, used)
        assert compiling is not None
        made = stage(f"compile {name}", lambda s=compiling: run_stage(cache, s, lambda *_: None))
        facts = json.loads((made / "engine.json").read_text("utf-8"))
        plan = made / "engine.plan"
        components.append(
            {
                "name": name,
                "policy_bytes": exported.weight_bytes,
                "plan_bytes": plan.stat().st_size,
                "compute_capabilities": read_header(plan).compute_capabilities,
                **facts,
            }
        )
        # Room for the next one.
        shutil.rmtree(exported.folder)
    return {"blocks": blocks, "checkpoint_bytes": total, "stages": rows, "components": components}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=38)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sd35-build-large"))
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    try:
        result = measure(folder, arguments.blocks)
    finally:
        shutil.rmtree(folder)
    built = result["stages"][1:]
    print(f"in all {sum(row['seconds'] for row in built):.1f} s after the checkpoint")
    for c in result["components"]:
        print(
            f"{c['name']}: policy {c['policy_bytes'] / 1e9:.3f} GB, "
            f"weights in the plan {c['weight_bytes'] / 1e9:.3f} GB, "
            f"plan {c['plan_bytes'] / 1e9:.3f} GB, activations {c['activation_bytes'] / 1e9:.2f} GB"
        )
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
