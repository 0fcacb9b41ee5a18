"""Layers spelled out in operators of opset 21, as TensorRT before 10.15 reads and fuses them.

It has no Attention and no RMSNormalization, and its GroupNormalization takes no scale per channel.
MatMul, Softmax and MatMul become one kernel where the query was scaled before; scaled where it is
normalized, it costs nothing. Of Large, a step of four blocks takes 9.14 ms so, and 9.64 ms with
norms that multiply in FP32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .fp8 import AttentionProcessor, fake_quantize, fp8_attention
from .layers import ExportGroupNorm, ExportRMSNorm, cast


class ExplicitRMSNorm(ExportRMSNorm):
    """``x / √(mean(x²) + eps) · weight``, the mean in FP32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight, _ = self.parameters_as(dtype)
        x = cast(x, dtype)
        mean = cast(x.abs(), torch.float32).square().mean(-1, keepdim=True)
        # Not in FP32: that would be a second cast of x, written to memory.
        factor = cast(torch.rsqrt(mean + self.eps), dtype)
        return cast(x * factor * weight, self.output_dtype)


class ExplicitGroupNorm(ExportGroupNorm):
    """InstanceNormalization over each group, then scale and bias per channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight, bias = self.parameters_as(dtype)
        x = cast(x, dtype)
        groups = x.reshape(x.shape[0], self.groups, -1)
        ones, zeros = (f(self.groups, dtype=dtype) for f in (torch.ones, torch.zeros))
        y = torch.onnx.ops.symbolic(
            "InstanceNormalization", (groups, ones, zeros), {"epsilon": float(self.eps)},
            dtype=dtype, shape=groups.shape,
        )  # fmt: skip
        channels = (-1, *[1] * (x.dim() - 2))
        y = y.reshape(x.shape) * weight.view(channels)
        return cast(y if bias is None else y + bias.view(channels), self.output_dtype)


class ExplicitAttentionProcessor(AttentionProcessor):
    """Image and text are joined before heads are moved in front of tokens: one transpose each.

    The query comes scaled by 1/√d, but for FP8, whose scales are those of what is not.
    """

    def join(
        self, attn: Any, image: tuple[torch.Tensor, ...], text: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`sd35_trt.export.fp8.AttentionProcessor`."""

        def heads(x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
            y: torch.Tensor = x.unflatten(-1, (attn.heads, -1))
            return y if norm is None else norm(y)

        operands = [
            heads(x, norm) for x, norm in zip(image, (attn.norm_q, attn.norm_k, None), strict=True)
        ]
        added: list[torch.Tensor] = []
        if text is not None:
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            added = [heads(x, norm) for x, norm in zip(text, norms, strict=True)]
        if not hasattr(attn, "q_scale"):
            # Of each where it was normalized, which is one kernel.
            scale = operands[0].shape[-1] ** -0.5
            operands[0] = operands[0] * scale
            added[:1] = [query * scale for query in added[:1]]
        if added:
            operands = [torch.cat(pair, dim=1) for pair in zip(operands, added, strict=True)]
        query, key, value = (operand.transpose(1, 2) for operand in operands)
        return query, key, value

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`sd35_trt.export.fp8.AttentionProcessor`; the query is scaled."""
        if hasattr(attn, "q_scale"):
            quantize = partial(fake_quantize, zero=attn.zero_point)
            return fp8_attention(quantize, attn, query, key, value)
        return torch.matmul(torch.softmax(torch.matmul(query, key.transpose(2, 3)), dim=-1), value)


def use_explicit_layers(part: nn.Module) -> None:
    """Put these layers in place of those that trace to newer operators; the policy is applied
    before."""
    from sd35_trt.compat.diffusers import Attention, has_joint_processor

    for name, module in list(part.named_modules()):
        layer: ExportRMSNorm | ExportGroupNorm
        if type(module) is ExportRMSNorm:
            layer = ExplicitRMSNorm(module.weight, module.eps)
        elif type(module) is ExportGroupNorm:
            layer = ExplicitGroupNorm(module.weight, module.bias, module.groups, module.eps)
        else:
            if isinstance(module, Attention) and (
                has_joint_processor(module) or hasattr(module, "q_scale")
            ):
                module.set_processor(ExplicitAttentionProcessor())
            continue
        layer.wide, layer.follows = module.wide, module.follows
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, layer)
