"""Pictures with their captions in a grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    images: np.ndarray, captions: Sequence[str], verdicts: Sequence[bool], columns: int = 8
) -> Image.Image:
    """Pictures in a grid with their captions beneath; a red frame marks one that is wrong."""
    side, text_height, gap = 144, 62, 8
    rows = -(-len(images) // columns)
    cell = side + gap, side + text_height
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for index, (image, caption, good) in enumerate(zip(images, captions, verdicts, strict=True)):
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        if not good:
            pen.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline="red", width=3)
        lines = textwrap.wrap(caption, 24)[:5]
        pen.multiline_text((x, y + side + 2), "\n".join(lines), "black", font, spacing=0)
    return sheet
