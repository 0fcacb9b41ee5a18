"""Input scales that a checkpoint's own files hold."""

from __future__ import annotations

from collections.abc import Iterable

from sd35_trt.components import component_row
from sd35_trt.errors import CheckpointError

from .merged import AnyCheckpoint
from .weights import Weights


def stored_magnitudes(checkpoint: AnyCheckpoint, layers: Iterable[str]) -> dict[str, float]:
    """The largest input magnitudes that a checkpoint's input scales stand for.

    Args:
        layers: ``component/layer``.

    Returns:
        By layer; empty where the checkpoint has none of them.

    Raises:
        CheckpointError: it has some of them.
    """
    values, without = {}, []
    weights: dict[str, Weights] = {}  # a folder's are opened anew each time
    for key in layers:
        component, _, layer = key.partition("/")
        part = component_row(component).part
        if part not in weights:
            weights[part] = checkpoint.weights(part)
        amax = weights[part].input_amax(layer)
        if amax is None:
            without.append(key)
        else:
            values[key] = amax
    if values and without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.root} has input scales, but none for {without[0]}{more}",
            f"measure them: sd35-trt calibrate --model {checkpoint.root} --out DIR",
        )
    return values
