"""The node that adds an adapter to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .folders import ADAPTERS, BY_PATH, choices, chosen
from .load import fingerprint
from .wires import CATEGORY, Model, ModelWire


class ApplyAdapter(io.ComfyNode):
    """A model → the same with an adapter. Several follow each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtAdapter",
            display_name="Adapter (SD3.5 TRT)",
            category=CATEGORY,
            description="Adds a LoRA that `sd35-trt adapter convert` made.",
            inputs=[
                ModelWire.Input("model"),
                io.Combo.Input(
                    "adapter",
                    options=choices(ADAPTERS),
                    tooltip="An adapter in models/sd35_adapters.",
                ),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="The file of an adapter that is elsewhere; comes first.",
                ),
            ],
            outputs=[ModelWire.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls, model: Model, adapter: str = BY_PATH, strength: float = 1.0, path: str = ""
    ) -> io.NodeOutput:
        return io.NodeOutput(model.with_adapter(chosen(ADAPTERS, adapter, path), strength))

    @classmethod
    def fingerprint_inputs(cls, adapter: str = BY_PATH, path: str = "", **_: Any) -> Any:
        return fingerprint(ADAPTERS, adapter, path)
