"""How many of mini's scenes survive each precision policy, on the same captions and seeds.

    python benchmarks/mini_policies.py --captions 500

builds a CPU bundle of mini for every policy, draws held-out captions and pairs each policy with the
first. What a policy drew is kept in ``--work``, so that a stopped run goes on there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec.structs import asdict
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sd35_trt.build import BuildOptions, build
from sd35_trt.mini.scoring import Score, heldout, score
from sd35_trt.quality.scenes import paired_difference, share
from sd35_trt.runtime import Pipeline

_BATCH = 16
_POLICIES = ("half", "fp8", "int8-weight", "int4-weight")


def draw(policy: str, calibration: Path | None, captions: list[str], work: Path) -> np.ndarray:
    """Pictures uint8 [n, 128, 128, 3]; caption i from seed i."""
    name = Path(policy).stem
    bundle = build(
        BuildOptions(
            policy=policy, out=work / name, batch=(1, _BATCH), size=(128, 128),
            calibration=calibration,
        )
    )  # fmt: skip
    pipe = Pipeline.load(bundle)
    # By content: what another checkpoint or exporter drew is not taken for this one's.
    hashes = [file.sha256 for c in pipe.manifest.components for file in c.files]
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]
    archive = work / f"{name}-{len(captions)}-{digest}.npz"
    if archive.exists():
        return np.load(archive)["images"]
    images = []
    with Progress() as progress:
        for first in progress.track(range(0, len(captions), _BATCH), description=name):
            part = captions[first : first + _BATCH]
            seeds = list(range(first, first + len(part)))
            images.append(pipe.generate(part, seed=seeds).images)
    pipe.close()
    pictures = np.concatenate(images)
    np.savez_compressed(archive, images=pictures)
    return pictures


def row(score: Score, reference: Score, tags: list[frozenset[str]]) -> dict[str, Any]:
    """Whole scenes, their interval, and the difference from the reference, by kind of caption."""
    shares: dict[str, Any] = {"statements": score.attribute_accuracy}
    for kind in ("all", "relation", "negation", "nested"):
        indices = [i for i, t in enumerate(tags) if kind == "all" or kind in t]
        ours = [score.verdicts[i].whole for i in indices]
        theirs = [reference.verdicts[i].whole for i in indices]
        shares[kind] = asdict(share(sum(ours), len(ours)))
        shares[f"{kind} against the first"] = asdict(paired_difference(theirs, ours))
    return shares


@click.command()
@click.option("--captions", default=500, show_default=True, type=click.IntRange(1))
@click.option("--policy", "policies", multiple=True, default=_POLICIES, show_default=True)
@click.option(
    "--calibration",
    "calibrations",
    multiple=True,
    type=(str, click.Path(path_type=Path)),
    help="POLICY PATH: not the packaged one.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/mini-policies"))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    captions: int,
    policies: tuple[str, ...],
    calibrations: tuple[tuple[str, Path], ...],
    work: Path,
    out: Path | None,
) -> None:
    """Draw with every policy and print what share of the scenes is right."""
    work.mkdir(parents=True, exist_ok=True)
    examples = heldout(captions)
    texts, tags = [e.caption for e in examples], [e.tags for e in examples]
    folders = dict(calibrations)
    rows: dict[str, dict[str, Any]] = {}
    first: Score | None = None
    for policy in policies:
        judged = score(draw(policy, folders.get(policy), texts, work), examples)
        first = first or judged
        rows[Path(policy).stem] = row(judged, first, tags)
    table = Table("policy", "whole scenes", "against the first", "relation", "negation", "nested")
    for name, shares in rows.items():
        cells = []
        for kind in ("all", "all against the first", "relation", "negation", "nested"):
            figures = shares[kind]
            value = figures.get("value", figures.get("difference"))
            cells.append(f"{value:+.1%}" if "difference" in figures else f"{value:.1%}")
        table.add_row(name, *cells)
    Console().print(table)
    if out:
        out.write_text(json.dumps({"captions": captions, "policies": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
