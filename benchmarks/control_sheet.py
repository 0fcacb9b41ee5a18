"""Pictures of mini, their edges, and what its ControlNet draws by them for another caption.

python benchmarks/control_sheet.py bundles/control --out docs/images/mini-control.png
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from sd35_trt.compat.opencv import canny_edges
from sd35_trt.mini.contact_sheet import contact_sheet
from sd35_trt.runtime import Control, Pipeline

PAIRS = (
    ("a red star above a blue ring on white", "a yellow star above a green ring on navy"),
    ("two large orange hearts on brown", "two large cyan hearts on black"),
    (
        "a large green cross to the left of a small pink circle",
        "a large purple cross to the left of a small orange circle on cream",
    ),
    ("a small pink diamond and a large yellow square", "a blue diamond and a red square on gray"),
)
SCALES = (0.5, 1.0)


def row(pipe: Pipeline, first: str, second: str, seed: int) -> dict[str, np.ndarray]:
    """Pictures uint8 [128, 128, 3] by what they are."""
    drawn = pipe.generate(first, seed=seed).images[0]
    edges = canny_edges(drawn)
    pictures = {first: drawn, "its edges": edges}
    pictures[f"no net: {second}"] = pipe.generate(second, seed=seed + 1).images[0]
    for scale in SCALES:
        controls = {"canny": Control(edges, scale)}
        result = pipe.generate(second, seed=seed + 1, controls=controls)
        pictures[f"canny:{scale:g}: {second}"] = result.images[0]
    return pictures


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of the first pictures.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write.")
def main(bundle: Path, seed: int, out: Path) -> None:
    """Draw a row of pictures for each pair of captions."""
    pictures: list[tuple[str, np.ndarray]] = []
    with Pipeline.load(bundle) as pipe:
        for first, second in PAIRS:
            pictures += row(pipe, first, second, seed).items()
    labels, images = zip(*pictures, strict=True)
    columns = len(pictures) // len(PAIRS)
    contact_sheet(np.stack(images), labels, [True] * len(images), columns).save(out)


if __name__ == "__main__":
    main()
