"""What FP8 costs with mini's LoRAs as inputs, and without, on the same captions and seeds.

    python benchmarks/mini_loras.py --captions 500

builds CPU bundles of mini in half precision and FP8 that take adapters, draws held-out captions
with and without LoRAs, and pairs FP8 with half precision caption by caption. Every batch that is
drawn is kept in ``--work``, so that a stopped run goes on there, and one of more captions uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec.structs import asdict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import lora_paths
from sd35_trt.mini.loras import LORAS, examples
from sd35_trt.mini.scenes import Example
from sd35_trt.mini.scoring import score
from sd35_trt.quality.scenes import paired_difference, share
from sd35_trt.runtime import Pipeline

_BATCH = 16
_POLICIES = ("half", "fp8")
_NONE = "none"
_MIXES = (_NONE, "night", "moon", "moon+night")


def open_pipeline(policy: str, work: Path) -> Pipeline:
    """A pipeline of mini that knows its LoRAs by name."""
    options = BuildOptions(
        policy=policy, out=work / policy, batch=(1, _BATCH), size=(128, 128), adapters=16
    )
    bundle = Bundle.open(build(options))
    pipe = Pipeline(bundle)
    for name, path in lora_paths().items():
        adapter = work / f"{name}.safetensors"
        write_adapter(adapter, convert_adapter(path, bundle))
        pipe.load_adapter(name, adapter)
    return pipe


def draw(
    pipe: Pipeline, loras: Sequence[str], shown: Sequence[Example], steps: int, work: Path
) -> np.ndarray:
    """Pictures uint8 [n, 128, 128, 3] of examples, whole batches of them; example i from seed i."""
    # By content: what other weights drew is not taken for these ones'.
    files = [file.sha256 for c in pipe.manifest.components for file in c.files]
    files += [hashlib.sha256(lora_paths()[name].read_bytes()).hexdigest() for name in loras]
    key = hashlib.sha256("".join((*files, str(steps))).encode()).hexdigest()[:12]
    images = []
    for first in track(
        range(0, len(shown), _BATCH), f"{pipe.manifest.policy.name} {'+'.join(loras)}"
    ):
        archive = work / f"{key}-{first}.npy"
        if not archive.exists():
            part = [e.caption for e in shown[first : first + _BATCH]]
            seeds = list(range(first, first + _BATCH))
            adapters = dict.fromkeys(loras, 1.0) or None
            np.save(archive, pipe.generate(part, seed=seeds, steps=steps, adapters=adapters).images)
        images.append(np.load(archive))
    return np.concatenate(images)


def mean_with_interval(values: np.ndarray) -> dict[str, float]:
    """Mean of values [n] and its 95 % interval."""
    mean, margin = values.mean(), 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return {"mean": float(mean), "low": float(mean - margin), "high": float(mean + margin)}


def differences(right: Mapping[str, Sequence[bool]]) -> np.ndarray:
    """What FP8 gains, caption by caption: -1, 0 or 1, float [n]."""
    return np.subtract(right["fp8"], right["half"], dtype=float)


def row(right: Mapping[str, Sequence[bool]], first: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Whole scenes of each policy, FP8's difference, and how far it is from that of a first mix."""
    against = differences(right) - differences(first)
    return {
        **{policy: asdict(share(sum(own), len(own))) for policy, own in right.items()},
        "difference": asdict(paired_difference(right["half"], right["fp8"])),
        "difference against the first's": mean_with_interval(against),
    }


def cells(figures: Mapping[str, Any]) -> list[str]:
    """Of a row of the table."""
    shares = [f"{figures[policy]['value']:.1%}" for policy in _POLICIES]
    own, against = figures["difference"], figures["difference against the first's"]
    return [
        *shares,
        f"{own['difference']:+.1%} ({own['low']:+.1%} to {own['high']:+.1%})",
        f"{against['mean']:+.1%} ({against['low']:+.1%} to {against['high']:+.1%})",
    ]


@click.command()
@click.option("--captions", default=500, show_default=True, type=click.IntRange(2))
@click.option("--mix", "mixes", multiple=True, default=_MIXES, show_default=True,
              type=click.Choice(_MIXES), help="The first is compared with.")  # fmt: skip
@click.option("--steps", default=28, show_default=True, type=click.IntRange(1))
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/mini-loras"))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(captions: int, mixes: tuple[str, ...], steps: int, work: Path, out: Path | None) -> None:
    """Draw with LoRAs in half precision and FP8, and print what share of the scenes is right."""
    work.mkdir(parents=True, exist_ok=True)
    pipes = {policy: open_pipeline(policy, work) for policy in _POLICIES}
    right: dict[str, dict[str, list[bool]]] = {}
    for mix in mixes:
        loras = [] if mix == _NONE else mix.split("+")
        whole = -(-captions // _BATCH) * _BATCH
        shown = examples([LORAS[name] for name in loras], whole, "heldout")
        right[mix] = {}
        for policy, pipe in pipes.items():
            images = draw(pipe, loras, shown, steps, work)[:captions]
            right[mix][policy] = [v.whole for v in score(images, shown[:captions]).verdicts]
    rows = {mix: row(own, right[mixes[0]]) for mix, own in right.items()}
    table = Table("LoRAs", *_POLICIES, "difference", "against the first's")
    for mix, figures in rows.items():
        table.add_row(mix, *cells(figures))
    Console().print(table)
    if out:
        facts = {"captions": captions, "steps": steps, "mixes": rows}
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
