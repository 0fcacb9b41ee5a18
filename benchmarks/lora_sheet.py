"""Some captions drawn without mini's LoRAs, with each, and with both.

python benchmarks/lora_sheet.py bundles/adapted --out docs/images/mini-loras.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np

from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import lora_paths
from sd35_trt.mini.contact_sheet import contact_sheet
from sd35_trt.runtime import Pipeline

MIXES = {
    "no LoRA": {},
    "night:0.5": {"night": 0.5},
    "night:1": {"night": 1.0},
    "moon:1": {"moon": 1.0},
    "moon:1, night:1": {"moon": 1.0, "night": 1.0},
}
CAPTIONS = (
    "a red star above a blue ring on a white background",
    "two large orange hearts on brown",
    "a large yellow moon on a gray background",
    "a small pink moon to the left of a large green square on cream",
)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of every picture.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write.")
def main(bundle: Path, seed: int, out: Path) -> None:
    """Draw a row of pictures for each caption."""
    images, labels = [], []
    with tempfile.TemporaryDirectory() as folder, Pipeline.load(bundle) as pipe:
        for name, path in lora_paths().items():
            adapter = Path(folder) / path.name
            write_adapter(adapter, convert_adapter(path, Bundle.open(bundle)))
            pipe.load_adapter(name, adapter)
        for caption in CAPTIONS:
            for label, mix in MIXES.items():
                images.append(pipe.generate(caption, seed=seed, adapters=mix or None).images[0])
                labels.append(f"{label}: {caption}")
    sheet = contact_sheet(np.stack(images), labels, [True] * len(images), columns=len(MIXES))
    sheet.save(out)


if __name__ == "__main__":
    main()
