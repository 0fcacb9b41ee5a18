"""Layers spelled out in operators of opset 21, as TensorRT before 10.15 reads and fuses them.

It has no Attention and no RMSNormalization, and its GroupNormalization takes no scale per channel.
What it makes one kernel of: MatMul, Softmax, MatMul, with query scaled before the first; a sum of
squares in FP32 with the cast in front of it, where the cast's result is read by nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .fp8 import AttentionProcessor, fake_quantize, fp8_attention
from .layers import ExportGroupNorm, ExportRMSNorm, cast


class ExplicitRMSNorm(ExportRMSNorm):
    """``x / √(mean(x²) + eps) · weight`` with the mean in FP32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight, _ = self.parameters_as(dtype)
        x = cast(x, dtype)
        # The absolute value keeps this cast apart from the one below: each is fused where it is.
        mean = x.abs().float().square().mean(-1, keepdim=True)
        y = x.float() * torch.rsqrt(mean + self.eps)
        return cast(cast(y, dtype) * weight, self.output_dtype)


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
    """Image and text are joined before heads are moved in front of tokens: one transpose each."""

    def join(
        self, attn: Any, image: tuple[torch.Tensor, ...], text: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`sd35_trt.export.fp8.AttentionProcessor`."""

        def heads(x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
            y: torch.Tensor = x.unflatten(-1, (attn.heads, -1))
            return y if norm is None else norm(y)

        norms = (attn.norm_q, attn.norm_k, None)
        operands = [heads(x, norm) for x, norm in zip(image, norms, strict=True)]
        if text is not None:
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            added = [heads(x, norm) for x, norm in zip(text, norms, strict=True)]
            operands = [torch.cat(pair, dim=1) for pair in zip(operands, added, strict=True)]
        query, key, value = (operand.transpose(1, 2) for operand in operands)
        return query, key, value

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`sd35_trt.export.fp8.AttentionProcessor`."""
        if hasattr(attn, "q_scale"):
            quantize = partial(fake_quantize, zero=attn.zero_point)
            return fp8_attention(quantize, attn, query, key, value)
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        return torch.matmul(torch.softmax(scores, dim=-1), value)


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
