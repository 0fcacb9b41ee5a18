"""Parts of the page that mini's small, complete reports do not reach."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from sd35_trt.formats.report import FinalError, FreeRunning, LatentErrors, TeacherForced
from sd35_trt.quality import plots
from sd35_trt.quality.page import _data_uri


@pytest.mark.parametrize(("side", "kind", "shown"), [(128, "PNG", 128), (1024, "JPEG", 512)])
def test_pictures_are_inside_the_page(side: int, kind: str, shown: int) -> None:
    axis = np.linspace(0, 255, side)
    image = np.stack(np.broadcast_arrays(axis[:, None], axis[None], 128.0), -1).astype(np.uint8)
    head, _, data = _data_uri(image).partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert (picture.format, picture.size) == (kind, (shown, shown))
        whole = Image.fromarray(image).resize(picture.size)
        assert np.abs(np.asarray(picture, int) - np.asarray(whole, int)).mean() < 3


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("transformer_blocks.3.attn.to_q", "q, k, v"),
        ("transformer_blocks.3.attn.add_v_proj", "q, k, v"),
        ("transformer_blocks.3.attn2.to_out.0", "output projections"),
        ("transformer_blocks.3.attn.to_add_out", "output projections"),
        ("transformer_blocks.3.ff.net.0.proj", "feed-forward in"),
        ("transformer_blocks.3.ff_context.net.2", "feed-forward out"),
        ("transformer_blocks.3.norm1_context.linear", "adaLN"),
        ("norm_out.linear", "adaLN"),
        ("encoder.block.1.layer.0.SelfAttention.o", "output projections"),
        ("encoder.block.1.layer.0.SelfAttention.q", "q, k, v"),
        ("encoder.block.1.layer.1.DenseReluDense.wi_0", "feed-forward in"),
        ("encoder.block.1.layer.1.DenseReluDense.wo", "feed-forward out"),
        ("text_model.encoder.layers.0.self_attn.k_proj", "q, k, v"),
        ("text_model.encoder.layers.0.self_attn.out_proj", "output projections"),
        ("text_model.encoder.layers.0.mlp.fc1", "feed-forward in"),
        ("time_text_embed.text_embedder.linear_1", "embedders"),
        ("context_embedder", "embedders"),
        ("proj_out", "embedders"),
        ("text_projection", "embedders"),
    ],
)
def test_kinds_of_linears(layer: str, kind: str) -> None:
    assert plots.kind(layer) == kind


def test_an_error_of_zero_beside_others_can_be_drawn() -> None:
    """Some pictures may be equal while others are not: a logarithm would have no place for them."""
    curve = (0.0, 0.1)
    svg = plots.latent_curve(
        LatentErrors(
            sigma=(0.5, 0.0),
            free_running=FreeRunning(curve, curve, curve, curve),
            teacher_forced=TeacherForced((0.0, 0.2), images=1),
            final=FinalError(0.1, 0.1, 0.1),
        )
    )
    assert svg.startswith("<svg")
    assert "nan" not in svg.lower()
