"""Draws held-out captions with mini and counts what the pictures show of them.

``python -m sd35_trt.quality.evaluate`` draws with diffusers from the packaged checkpoint, with
``--bundle`` from a built bundle.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.mini.checker import scikit_image
from sd35_trt.mini.contact_sheet import contact_sheet
from sd35_trt.mini.loras import LORAS, examples
from sd35_trt.mini.scoring import GUIDANCE, STEPS, Score, score
from sd35_trt.mini.world import SIZE
from sd35_trt.runtime import Pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch.nn import Module


def draw(
    pipe: StableDiffusion3Pipeline,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    first_seed: int = 0,
    batch: int = 64,
) -> np.ndarray:
    """Draw captions with diffusers; caption i starts from seed ``first_seed + i``.

    Returns uint8 [n, 128, 128, 3].
    """
    import torch

    images = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        seeds = range(first_seed + start, first_seed + start + len(part))
        out = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            max_sequence_length=pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 else 32,
            output_type="np",
        ).images
        images.append(np.round(255 * out).astype(np.uint8))
    return np.concatenate(images)


def draw_from_bundle(
    bundle: Path,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    first_seed: int = 0,
    loras: Sequence[str] = (),
) -> np.ndarray:
    """As :func:`draw`, one caption at a time, from a bundle built of this checkpoint.

    ``loras`` are of mini's, all of them at once.
    """
    images = []
    with tempfile.TemporaryDirectory() as folder, Pipeline.load(bundle) as pipe:
        for name, path in _converted(loras, bundle, Path(folder)).items():
            pipe.load_adapter(name, path)
        for index, caption in enumerate(captions):
            result = pipe.generate(
                [caption],
                seed=[first_seed + index],
                steps=steps,
                guidance=guidance,
                size=(SIZE, SIZE),
                adapters=dict.fromkeys(loras, 1.0) or None,
            )
            images.append(result.images[0])
    return np.stack(images)


def _converted(loras: Sequence[str], bundle: Path, folder: Path) -> dict[str, Path]:
    """LoRAs of mini as a bundle takes them, by name, in files of a folder."""
    if not loras:
        return {}
    from sd35_trt.checkpoints.adapter_convert import convert_adapter

    files = {name: folder / f"{name}.safetensors" for name in loras}
    for name, file in files.items():
        write_adapter(file, convert_adapter(Path(f"mini:{name}"), Bundle.open(bundle)))
    return files


def round_weights(module: Module, bits: int) -> None:
    """Round the weights of every linear layer in place to ``bits``, one scale per tensor.

    Symmetric round to nearest, the scale from the largest magnitude. Raises ValueError for fewer
    than 2 bits.
    """
    import torch

    if bits < 2:
        raise ValueError(f"cannot round to {bits} bits; 2 is the least")
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                scale = layer.weight.abs().max() / top
                layer.weight.copy_((layer.weight / scale).round() * scale)


def load(checkpoint: Path, device: str = "cpu") -> StableDiffusion3Pipeline:
    """The pipeline of a diffusers directory in FP32."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(checkpoint, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _print(result: Score) -> None:
    click.echo(f"{len(result.verdicts)} captions, by chance in brackets")
    click.echo(
        f"whole_scene_accuracy {result.whole_scene_accuracy:7.2%} "
        f"({result.chance_whole_scene_accuracy:.2%})"
    )
    click.echo(
        f"attribute_accuracy   {result.attribute_accuracy:7.2%} "
        f"({result.chance_attribute_accuracy:.2%})"
    )
    for title, shares in (("statements", result.attributes), ("whole scenes", result.scenes)):
        click.echo(f"{title}:")
        for name, (share, count) in shares.items():
            click.echo(f"  {name:12} {share:7.2%} of {count}")


@click.command()
@click.option("--captions", default=500, show_default=True, type=click.IntRange(1))
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="Not the packaged one."
)
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="Draw from a bundle.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    type=click.Choice(list(LORAS)),
    help="One of mini's, with --bundle; may be given more than once. The captions are its own.",
)
@click.option("--steps", default=STEPS, show_default=True, type=click.IntRange(1))
@click.option("--guidance", default=GUIDANCE, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="For diffusers.")
@click.option(
    "--batch", default=16, show_default=True, help="Captions drawn at a time, by diffusers."
)
@click.option(
    "--drop-t5", is_flag=True, help="Without T5, as diffusers does without text_encoder_3."
)
@click.option("--weight-bits", type=click.IntRange(2, 8), help="Round the transformer's weights.")
@click.option(
    "--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Contact sheet (PNG)."
)
@click.option("--sheet-captions", default=40, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    captions: int,
    checkpoint: Path | None,
    bundle: Path | None,
    loras: tuple[str, ...],
    steps: int,
    guidance: float,
    device: str,
    batch: int,
    drop_t5: bool,
    weight_bits: int | None,
    sheet: Path | None,
    sheet_captions: int,
    as_json: bool,
) -> None:
    """Draw held-out captions and count what the pictures show of them."""
    if bundle and (checkpoint or drop_t5 or weight_bits):
        raise click.UsageError("--bundle takes none of --checkpoint, --drop-t5, --weight-bits")
    if loras and not bundle:
        raise click.UsageError("--lora needs --bundle, of one that was built with --adapters 16")
    scikit_image()  # before minutes of drawing
    shown = examples([LORAS[name] for name in loras], captions, "heldout")
    texts = [e.caption for e in shown]
    if bundle:
        images = draw_from_bundle(bundle, texts, steps=steps, guidance=guidance, loras=loras)
    else:
        pipe = load(checkpoint or checkpoint_path(), device)
        if drop_t5:
            pipe.text_encoder_3 = pipe.tokenizer_3 = None
        if weight_bits:
            round_weights(pipe.transformer, weight_bits)
        images = draw(pipe, texts, steps=steps, guidance=guidance, batch=batch)
    result = score(images, shown)
    if sheet:
        first = slice(sheet_captions)
        passed = [v.whole for v in result.verdicts]
        contact_sheet(images[first], texts[first], passed[first]).save(sheet)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        _print(result)


if __name__ == "__main__":
    main()
