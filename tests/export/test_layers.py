"""The exporter's layers compute what the ones they replace compute."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import nn

from sd35_trt.export.layers import (
    ExportLinear,
    ExportRMSNorm,
    PositionTable,
    SeparablePositionTable,
    is_separable,
)


def fill(layer: nn.Module, source: torch.Tensor) -> None:
    for name, (_, convert) in layer.SOURCES.items():  # type: ignore[union-attr]
        layer.get_parameter(name).data.copy_(convert(source))


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (3, 7), (12, 1)])
@pytest.mark.parametrize("separable", [True, False])
def test_position_tables_crop_as_diffusers(size: tuple[int, int], separable: bool) -> None:
    embed = PatchEmbed(16, 16, patch_size=2, in_channels=4, embed_dim=32, pos_embed_max_size=12)
    table = embed.pos_embed.clone()
    if not separable:
        table += torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
        embed.pos_embed = table
    assert is_separable(table) == separable
    kinds = (PositionTable, SeparablePositionTable) if separable else (PositionTable,)
    for kind in kinds:
        layer = kind(12, 32)
        fill(layer, table)
        expected = embed.cropped_pos_embed(size[0] * 2, size[1] * 2)
        torch.testing.assert_close(layer(*size), expected, rtol=0, atol=0)


def test_linear_and_rms_norm() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    linear = nn.Linear(16, 24)
    torch.testing.assert_close(ExportLinear(linear)(x), linear(x))
    assert ExportLinear(linear).weight.shape == (16, 24)
    norm = DiffusersRMSNorm(16, eps=1e-6)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(ExportRMSNorm(norm.weight, norm.eps)(x), norm(x))


def test_a_half_linear_takes_single_inputs() -> None:
    linear = nn.Linear(16, 24)
    layer = ExportLinear(linear.half())
    assert layer(torch.randn(3, 16)).dtype == torch.float16
