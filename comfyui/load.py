"""The node that opens a bundle."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .folders import BUNDLES, BY_PATH, choices, chosen, version
from .pipelines import open_pipeline
from .wires import CATEGORY, Model, ModelWire

_DEVICES = ["as built", "cpu", *(f"cuda:{number}" for number in range(8))]


class LoadBundle(io.ComfyNode):
    """A bundle's directory → a model. Its engines load when they are first used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtLoadBundle",
            display_name="Load Bundle (SD3.5 TRT)",
            category=CATEGORY,
            description="Opens a bundle that `sd35-trt build` made.",
            inputs=[
                io.Combo.Input(
                    "bundle", options=choices(BUNDLES), tooltip="A bundle in models/sd35_bundles."
                ),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="The directory of a bundle that is elsewhere; comes first.",
                ),
                io.Combo.Input(
                    "device",
                    options=_DEVICES,
                    default=_DEVICES[0],
                    optional=True,
                    tooltip="Where to draw.",
                ),
                io.String.Input(
                    "vram_budget",
                    default="",
                    optional=True,
                    tooltip="GPU memory to stay within, such as 8GiB; empty is without limit.",
                ),
            ],
            outputs=[ModelWire.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        bundle: str = BY_PATH,
        path: str = "",
        device: str = _DEVICES[0],
        vram_budget: str = "",
    ) -> io.NodeOutput:
        opened = open_pipeline(
            chosen(BUNDLES, bundle, path),
            None if device == _DEVICES[0] else device,
            vram_budget.strip() or None,
        )
        return io.NodeOutput(Model(opened))

    @classmethod
    def fingerprint_inputs(cls, bundle: str = BY_PATH, path: str = "", **_: Any) -> Any:
        return fingerprint(BUNDLES, bundle, path)


def fingerprint(kind: str, name: str, path: str) -> Any:
    """What changes with the files that a node reads, so that ComfyUI runs it again then."""
    try:
        return version(chosen(kind, name, path))
    except ValueError:
        return None  # the node itself says what is wrong
