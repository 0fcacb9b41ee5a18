"""What a model was taken for, in words, before any work."""

from __future__ import annotations

from pathlib import Path

from sd35_trt.checkpoints.configuration import KINDS
from sd35_trt.components import COMPONENTS, NO_T5, control_part

from .decide import Decision


def describe(decision: Decision) -> list[str]:
    """Lines with the variant and what it is drawn with, the parts' files, LoRAs, and notes."""
    model = decision.model
    steps, guidance = decision.steps_and_guidance
    rows = [
        (
            "model",
            f"{model.name}, taken for {model.variant.name}: {steps} steps, guidance {guidance:g}, "
            f"shift {model.scheduler.values.shift:g}",
        )
    ]
    for part in dict.fromkeys(row.part for row in COMPONENTS.values()):
        weights = model.checkpoint.weights(part) if model.checkpoint.has(part) else None
        rows.append((KINDS[part].title, NO_T5 if weights is None else _listed(weights.files)))
    for merged in model.loras:
        layers = (f"{count} of {KINDS[part].title}" for part, count in merged.parts.items())
        scaled = f"{merged.file} at {merged.lora.factor}"
        rows.append(("LoRA", f"{scaled}, in layers: {', '.join(layers)}"))
    for net in model.nets:
        config = model.checkpoint.config(control_part(net.name))
        factor, offset, _ = net.encoding
        rows.append(
            (
                "ControlNet",
                f"{net.name}: {net.place}, {config['num_layers']} blocks, pictures of the kind "
                f"{net.kind}, as {255 * factor:g}·x{offset:+g}",
            )
        )
    width = max(len(title) for title, _ in rows)
    return [
        *(f"{title:<{width}}  {text}" for title, text in rows),
        *(f"note: {note}" for note in model.notes),
    ]


def _listed(files: list[Path]) -> str:
    """The first of some files, and how many more there are."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more}"
