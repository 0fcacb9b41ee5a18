"""The node that adds skip-layer guidance to a model."""

from __future__ import annotations

from comfy_api.latest import io

from sd35_trt.errors import UsageError

from .wires import CATEGORY, Model, ModelWire


class SkipLayers(io.ComfyNode):
    """A model → the same with skip-layer guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtSkipLayers",
            display_name="Skip-Layer Guidance (SD3.5 TRT)",
            category=CATEGORY,
            description="Steers away from what the model draws without some of its blocks. "
            "Needs a bundle that was built with it.",
            inputs=[
                ModelWire.Input("model"),
                io.String.Input("layers", default="7, 8, 9", tooltip="Blocks to leave out."),
                io.Float.Input("scale", default=2.8, min=-100.0, max=100.0, step=0.1),
                io.Float.Input(
                    "start", default=0.01, min=0.0, max=1.0, step=0.001,
                    tooltip="Part of the steps after which it counts.",
                ),
                io.Float.Input(
                    "stop", default=0.2, min=0.0, max=1.0, step=0.001,
                    tooltip="Part of the steps before which it counts.",
                ),
            ],
            outputs=[ModelWire.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Model, layers: str, scale: float, start: float, stop: float
    ) -> io.NodeOutput:
        skipping = model.with_skips(
            skip_guidance_layers=_numbers(layers),
            skip_layer_guidance_scale=scale,
            skip_layer_guidance_start=start,
            skip_layer_guidance_stop=stop,
        )
        return io.NodeOutput(skipping)


def _numbers(layers: str) -> list[int]:
    try:
        return [int(number) for number in layers.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"layers are numbers, not {layers!r}", "write: 7, 8, 9") from error
