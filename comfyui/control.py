"""The node that has a model follow a picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Control

from .arrays import pixels_of
from .wires import CATEGORY, Model, ModelWire


class ApplyControl(io.ComfyNode):
    """A model and a picture → the same with a ControlNet. Several follow each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtControl",
            display_name="Apply ControlNet (SD3.5 TRT)",
            category=CATEGORY,
            description="Has a ControlNet of the bundle follow a picture. Needs a bundle that was "
            "built with it.",
            inputs=[
                ModelWire.Input("model"),
                io.Image.Input(
                    "image", tooltip="What the net was trained on, such as edges; it is resized."
                ),
                io.String.Input(
                    "net", default="canny", tooltip="Its name in --controlnet NAME=DIR."
                ),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                    tooltip="Part of the steps after which it begins.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                    tooltip="Part of the steps at which it ends.",
                ),
                io.Boolean.Input(
                    "edges", default=False, optional=True,
                    tooltip="Find the edges of the picture by OpenCV, and follow these.",
                ),
            ],
            outputs=[ModelWire.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Model,
        image: torch.Tensor,
        net: str,
        strength: float,
        start_percent: float,
        end_percent: float,
        edges: bool = False,
    ) -> io.NodeOutput:
        pixels = pixels_of(image)
        if len(pixels) != 1:
            raise UsageError(f"{len(pixels)} pictures for one net", "give one for all images")
        control = Control(pixels[0], strength, start_percent, end_percent, edges)
        return io.NodeOutput(model.with_control(net.strip(), control))
