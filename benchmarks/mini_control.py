"""How well mini follows outlines with its ControlNet, and what that leaves of its captions.

    python benchmarks/mini_control.py --captions 200

builds CPU bundles of mini in half precision and FP8 that have the net, and draws held-out captions
alone, and with the edges of a scene that each describes. The checker looks for the scene's outlines
in the pictures, and for what the captions say. Every batch that is drawn is kept in ``--work``, so
that a stopped run goes on there, and one of more captions uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec.structs import asdict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.mini.checker import find, judge_detections
from sd35_trt.mini.outlines import followed, follows
from sd35_trt.mini.rendering import render
from sd35_trt.mini.scenes import Example
from sd35_trt.mini.scoring import heldout
from sd35_trt.quality.scenes import paired_difference, share
from sd35_trt.runtime import Control, PipelinePool

_BATCH = 16
_NET = "canny"
_POLICIES = ("half", "fp8")
_SCALES = (0.0, 0.5, 1.0)


def draw(
    pool: PipelinePool, shown: Sequence[Example], scale: float, steps: int, work: Path
) -> np.ndarray:
    """Pictures uint8 [n, 128, 128, 3] of examples, whole batches of them; example i from seed i.

    Each follows the edges of its own scene.
    """
    # By content: what other weights drew is not taken for these ones'.
    ((policy, pipe),) = pool.pipelines.items()
    files = [file.sha256 for c in pipe.manifest.components for file in c.files]
    key = hashlib.sha256("".join((*files, str((steps, scale)))).encode()).hexdigest()[:12]
    images = []
    for first in track(range(0, len(shown), _BATCH), f"{policy} {scale:g}"):
        archive = work / f"{key}-{first}.npy"
        if not archive.exists():
            tickets = [
                pool.submit(
                    example.caption,
                    seed=seed,
                    steps=steps,
                    controls={_NET: Control(render(example.scene), scale, edges=True)},
                )
                for seed, example in enumerate(shown[first : first + _BATCH], first)
            ]
            np.save(archive, np.concatenate([ticket.result().images for ticket in tickets]))
        images.append(np.load(archive))
    return np.concatenate(images)


def verdicts(images: np.ndarray, shown: Sequence[Example]) -> dict[str, list[bool]]:
    """What holds of pictures.

    Returns:
        ``scenes`` and ``outlines``: of each, whether all of it is as the caption says, and whether
        it has the outlines of its scene and no other; ``things``: of each thing of the scenes,
        whether its outline is there; ``colours``: of each that captions name, whether it is there.
    """
    found = [find(image) for image in images]
    judged = [judge_detections(*own, e.spec) for own, e in zip(found, shown, strict=True)]
    pairs = [(things, e.scene) for (_, things), e in zip(found, shown, strict=True)]
    return {
        "scenes": [verdict.whole for verdict in judged],
        "outlines": [follows(things, scene) for things, scene in pairs],
        "things": [holds for things, scene in pairs for holds in followed(things, scene)],
        "colours": [holds for v in judged for holds in v.statements.get("colour", ())],
    }


def row(own: dict[str, list[bool]]) -> dict[str, Any]:
    """The shares, with their intervals."""
    return {name: asdict(share(sum(holds), len(holds))) for name, holds in own.items()}


@click.command()
@click.option("--captions", default=200, show_default=True, type=click.IntRange(2))
@click.option("--policy", "policies", multiple=True, default=_POLICIES, show_default=True)
@click.option("--scale", "scales", multiple=True, default=_SCALES, show_default=True, type=float)
@click.option("--steps", default=28, show_default=True, type=click.IntRange(1))
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/mini-control"))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    captions: int,
    policies: tuple[str, ...],
    scales: tuple[float, ...],
    steps: int,
    work: Path,
    out: Path | None,
) -> None:
    """Draw with mini's ControlNet, and print what share of outlines and captions is followed."""
    work.mkdir(parents=True, exist_ok=True)
    shown = heldout(-(-captions // _BATCH) * _BATCH)
    own: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for policy in policies:
        options = BuildOptions(
            policy=policy,
            out=work / policy,
            batch=(1, _BATCH),
            size=(128, 128),
            controlnets=(ControlNet(_NET, f"mini:{_NET}"),),
        )
        with PipelinePool({policy: build(options)}) as pool:
            drawn = {scale: draw(pool, shown, scale, steps, work) for scale in scales}
        own[policy] = {
            f"{scale:g}": verdicts(images[:captions], shown[:captions])
            for scale, images in drawn.items()
        }
    table = Table("policy", "scale", *own[policies[0]][f"{scales[0]:g}"])
    facts: dict[str, Any] = {"captions": captions, "steps": steps, "policies": {}}
    for policy, by_scale in own.items():
        facts["policies"][policy] = {scale: row(found) for scale, found in by_scale.items()}
        for scale, found in facts["policies"][policy].items():
            table.add_row(policy, scale, *(f"{one['value']:.1%}" for one in found.values()))
    Console().print(table)
    if set(_POLICIES) <= set(own):
        facts["fp8 against half"] = {
            scale: {
                name: asdict(paired_difference(half[name], own["fp8"][scale][name]))
                for name in ("scenes", "outlines")
            }
            for scale, half in own["half"].items()
        }
    if out:
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
