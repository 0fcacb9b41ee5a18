"""Working memory that TensorRT for RTX takes, by component, as a sum of products of its dimensions.

    python benchmarks/activations.py --work /tmp --out sd35_trt/activations.json

Compiles random models of SD3.5's widths, and mini, at a few shapes, and reads the bytes that the
library reports; ``sd35-trt plan`` takes its table from here. Weights do not matter, and depth
hardly: of the repeated blocks four are compiled, and the conditioner's output is made as long as
all of them need. Bytes grow with the dimensions exactly as the terms say; how far the fitted sums
are from what was measured is printed. Takes 20 minutes on two cores.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from random_checkpoint import write_part, write_transformer
from scipy.optimize import nnls

from sd35_trt.activations import activation_bytes, product
from sd35_trt.bundle import Ranges
from sd35_trt.calibration_file import Calibration
from sd35_trt.components import COMPONENTS
from sd35_trt.dimensions import Bounds, dimension_bounds
from sd35_trt.engines.builder import EngineOptions, ExportedComponent
from sd35_trt.engines.tensorrt_builder import TensorRTBuilder, create
from sd35_trt.export.checkpoint import Checkpoint
from sd35_trt.export.component import ExportOptions, export_component, fp8_layers
from sd35_trt.export.scales import Scales
from sd35_trt.export.structure import Structure
from sd35_trt.mini import calibration_path, checkpoint_path
from sd35_trt.policy import load_policy

# Blocks that are compiled: with fewer, the library fuses less. CLIP is whole.
_DEPTH, _T5_DEPTH = 4, 8

# A sum that is further off is left out: what is left out is estimated.
_TOLERANCE = 0.05

# Policy, compute capability it is compiled for, and those that take the same memory.
_TARGETS = (
    ("fp8", "8.9", ("8.9",)),
    ("fp8", "12.0", ("12.0", "12.1")),
    ("int8-weight", "7.5", ("7.5",)),
    ("int8-weight", "8.6", ("8.0", "8.6", "8.9")),
    ("half", "8.6", ("8.0", "8.6", "8.9", "12.0", "12.1")),
)

_TERMS = {
    "clip_l": ("batch", ""),
    "clip_g": ("batch", ""),
    "t5": ("batch*tokens", "batch*tokens*tokens", ""),
    "conditioner": ("samples*steps", "samples*tokens", ""),
    "denoiser": ("batch*height*width", "batch*tokens", ""),
    "vae_decoder": ("batch*height*width", ""),
    "vae_encoder": ("batch*image_height*image_width", ""),
}

# Shapes that are compiled, the last one to check the sum that the others give.
_LATENTS = [(1, 64, 128), (2, 128, 128), (4, 192, 192)]
_SHAPES: dict[str, list[dict[str, int]]] = {
    "clip_l": [{"batch": n} for n in (2, 8, 4)],
    "clip_g": [{"batch": n} for n in (2, 8, 4)],
    "t5": [{"batch": b, "tokens": t} for b, t in ((2, 256), (2, 512), (8, 512), (4, 256))],
    "conditioner": [
        {"samples": s, "tokens": t, "steps": n}
        for s, t, n in ((2, 333, 28), (8, 333, 28), (8, 589, 32), (4, 333, 4))
    ],
    "denoiser": [
        {"batch": b, "height": h, "width": w, "tokens": t}
        for (b, h, w), t in [*zip(_LATENTS, (333, 589, 589), strict=True), ((2, 128, 192), 333)]
    ],
    "vae_decoder": [{"batch": b, "height": h, "width": w} for b, h, w in _LATENTS],
    "vae_encoder": [
        {"batch": b, "image_height": 8 * h, "image_width": 8 * w} for b, h, w in _LATENTS
    ],
}

# For mini, whose text is shorter and whose pictures are smaller.
_MINI = {
    "tokens": 0.3,
    "height": 0.125,
    "width": 0.125,
    "image_height": 0.125,
    "image_width": 0.125,
}


def _write_reduced(root: Path, model: str) -> dict[str, Any]:
    """A random checkpoint with few blocks; returns the transformer's full configuration."""
    structure = Structure(model)
    config = structure.config("transformer")
    reduced = {**config, "num_layers": _DEPTH}
    if config.get("dual_attention_layers"):
        reduced["dual_attention_layers"] = list(range(_DEPTH // 2))
    write_transformer(root, reduced)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        some = structure.config(part)
        if part == "text_encoder_3":
            some["num_layers"] = _T5_DEPTH
        write_part(root, part, some)
    index = json.loads((root / "model_index.json").read_text())
    index |= {row.part: ["-", "-"] for row in COMPONENTS.values()}
    (root / "model_index.json").write_text(json.dumps(index))
    return config


@dataclass(frozen=True)
class _Case:
    """A component to measure.

    Attributes:
        models: whose table has it.
        guided: None where it does not matter.
        calibration: None makes one up.
        missing: rows of the modulation that the blocks left out would add.
    """

    name: str
    models: tuple[str, ...]
    checkpoint: Checkpoint
    guided: bool | None = None
    calibration: Calibration | None = None
    missing: int = 0

    def is_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the table is this case's."""
        return (row["component"], tuple(row["models"]), row["guided"]) == (
            self.name, self.models, self.guided
        )  # fmt: skip

    @property
    def options(self) -> ExportOptions:
        return ExportOptions(32 if self.models == ("mini",) else 77, self.guided is not False)

    @property
    def usual(self) -> dict[str, Bounds]:
        """The bounds that ``sd35-trt build`` takes by default."""
        mini = self.models == ("mini",)
        sizes, pixels, tokens = ((64, 192), 128, 32) if mini else ((512, 1536), 1024, 256)
        ranges = Ranges((1, 4), sizes, 64, (min(77, tokens), 512))
        defaults = {"steps": 28, "size": (pixels, pixels), "t5_tokens": tokens}
        clip_tokens = self.options.clip_tokens
        guided = self.guided is not False
        return dimension_bounds(self.name, ranges, defaults, clip_tokens, guided)

    @property
    def shapes(self) -> list[dict[str, int]]:
        if self.models != ("mini",):
            return _SHAPES[self.name]
        return [
            {d: int(n * _MINI.get(d, 1)) for d, n in dims.items()} for dims in _SHAPES[self.name]
        ]


def _cases(work: Path) -> Iterator[_Case]:
    mini = Checkpoint(checkpoint_path())
    calibration = Calibration.load(calibration_path())
    for name in COMPONENTS:
        guided = True if name == "denoiser" else None
        yield _Case(name, ("mini",), mini, guided, calibration)
    for model in ("large", "medium"):
        config = _write_reduced(work / model, model)
        checkpoint = Checkpoint(work / model)
        dual = len(config.get("dual_attention_layers") or ())
        # Six rows for the image and six for the text, three more for a second attention.
        missing = 12 * (config["num_layers"] - _DEPTH) + 3 * (dual - (_DEPTH // 2 if dual else 0))
        same = ("large", "large-turbo") if model == "large" else ("medium",)
        yield _Case("conditioner", same, checkpoint, missing=missing)
        yield _Case("denoiser", same, checkpoint, True)
        if model == "large":
            yield _Case("denoiser", same, checkpoint, False)
            for name, row in COMPONENTS.items():
                if row.part != "transformer":
                    yield _Case(name, (*same, "medium"), checkpoint)


def _measure(
    builder: TensorRTBuilder,
    component: ExportedComponent,
    usual: Mapping[str, Bounds],
    dims: Mapping[str, int],
    out: Path,
) -> int:
    """Bytes that an engine takes that is built for shapes up to these, and a build's usual ones."""
    bounds = {}
    for name in (d for port in component.inputs for d in port.dynamic):
        low, middle, _ = usual[name]
        bounds[name] = (min(low, dims[name]), min(middle, dims[name]), dims[name])
    with tempfile.TemporaryDirectory(dir=out) as folder:
        builder.compile(component, bounds, Path(folder), lambda fraction, note: None)
        return int(json.loads((Path(folder) / "engine.json").read_text())["activation_bytes"])


def _fit(
    names: tuple[str, ...], shapes: list[dict[str, int]], found: list[int]
) -> dict[str, float]:
    """Least squares of the relative errors; no term takes memory away."""
    matrix = np.array([[product(term, dims) for term in names] for dims in shapes], np.float64)
    relative = matrix / np.array(found)[:, None]
    scale = relative.max(axis=0)
    solved, _ = nnls(relative / scale, np.ones(len(shapes)))
    return {term: round(float(v), 3) for term, v in zip(names, solved / scale, strict=True)}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="10 GB are written.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The table, JSON.")
@click.option("--model", "models", multiple=True, help="Only these; the table keeps the others.")
@click.option("--component", "names", multiple=True, help="Only these; the table keeps the others.")
def main(work: Path, out: Path, models: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Measure, fit, and write the table."""
    rows: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary)
        for number, case in enumerate(_cases(folder)):
            if (models and case.models[0] not in models) or (names and case.name not in names):
                continue
            rows = [r for r in rows if not case.is_row(r)]
            exported: dict[str, ExportedComponent] = {}
            for policy, capability, alike in _TARGETS:
                if policy not in exported:
                    made = folder / f"{number}-{policy}"
                    made.mkdir()
                    exported[policy] = _export(case, policy, made)
                builder = create("tensorrt-rtx", (capability,), EngineOptions())
                library = builder.versions()
                found = [
                    _measure(builder, exported[policy], case.usual, d, folder) for d in case.shapes
                ]
                terms = _fit(_TERMS[case.name], case.shapes, found)
                sums = [activation_bytes(terms, dims) for dims in case.shapes]
                gap = max(abs(a / b - 1) for a, b in zip(sums, found, strict=True))
                if case.missing:
                    terms["samples*steps"] += case.missing * _row_bytes(exported[policy])
                about = f"{case.name} {'/'.join(case.models)} {policy} {capability}"
                click.echo(f"{about}: {terms}, off by {gap:.2%}")
                if gap > _TOLERANCE:
                    continue
                rows.append(
                    {
                        "component": case.name,
                        "models": case.models,
                        "guided": case.guided,
                        "policy": policy,
                        "compute_capabilities": alike,
                        "terms": terms,
                        "measured": [[d, n] for d, n in zip(case.shapes, found, strict=True)],
                    }
                )
            for made in exported.values():
                shutil.rmtree(made.folder)
            data = {"library": library, "rows": rows}
            out.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


def _export(case: _Case, policy: str, out: Path) -> ExportedComponent:
    rules = load_policy(policy)
    layers, _ = fp8_layers(case.checkpoint, COMPONENTS, rules)
    known = case.calibration or Calibration(dict.fromkeys(layers, 8.0), {}, {}, {})
    scales = Scales.of(known, COMPONENTS[case.name].part)
    export_component(case.name, case.checkpoint, rules, case.options, out, scales=scales)
    return ExportedComponent.read(out)


def _row_bytes(conditioner: ExportedComponent) -> int:
    """Of one row of the modulation."""
    port = next(p for p in conditioner.outputs if p.name == "modulation")
    width = port.shape[-1]
    assert isinstance(width, int)
    return width * np.dtype(port.dtype).itemsize


if __name__ == "__main__":
    main()
