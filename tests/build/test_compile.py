"""What of a model is compiled while nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd35_trt.build.compile import compiled_alone
from sd35_trt.engines.builder import ExportedComponent
from sd35_trt.formats.bundle import Port

GIB = 1 << 30
LARGEST = {"batch": 4, "height": 192, "width": 192, "image_height": 1536, "image_width": 1536}


def _component(name: str, weight_bytes: int, inputs: Port, outputs: Port) -> ExportedComponent:
    return ExportedComponent(
        Path(), name, weight_bytes, (inputs,), (outputs,), {}, {}, weight_bytes, weight_bytes
    )


DECODER = _component(
    "vae_decoder",
    GIB // 10,
    Port("latents", "float32", ("batch", 16, "height", "width")),
    Port("image", "uint8", ("batch", "image_height", "image_width", 3)),
)
TEXT = _component(
    "clip_l", GIB // 4, Port("ids", "int64", ("batch", 77)), Port("x", "float16", ("batch", 768))
)

STEP = _component(
    "control_canny", GIB // 4, Port("latents", "float32", ("batch", 16, "height", "width")),
    Port("residuals", "float16", ("batch", 64)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("activations", "device_bytes", "large"),
    [(14 * GIB, 80 * GIB, True), (6 * GIB, 80 * GIB, False), (6 * GIB, 24 * GIB, True)],
)
def test_what_takes_much_of_the_gpu_is_compiled_alone(
    activations: int, device_bytes: int, large: bool
) -> None:
    names = compiled_alone(
        [TEXT, DECODER, STEP],
        dict.fromkeys(("clip_l", "vae_decoder", "control_canny"), LARGEST),
        {
            "vae_decoder": activations,
            "control_canny": 0,
        }.__getitem__,  # nobody asks of the small one
        device_bytes,
    )
    assert ("vae_decoder" in names) == large
    assert "clip_l" not in names
    assert "control_canny" in names  # it runs in every step
