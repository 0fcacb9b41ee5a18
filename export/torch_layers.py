"""Quantized layers for programs of PyTorch operators, in place of those that trace to ONNX.

They compute what the ONNX graph means and an engine makes of it: operands on E4M3's grid with
static scales, products summed in FP32, the scales applied to the sum. A layer of a program has its
weight as the checkpoint has it, [out, in], which is how tensor cores take E4M3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sd35_trt.errors import UsageError
from sd35_trt.programs.fused import E4M3, fp8_attention, quantize, scaled_product

from .fp8 import IMAGE_PROJECTIONS, TEXT_PROJECTIONS, AttentionProcessor, Fp8Linear
from .layers import Layer, Sources, cast
from .quantized import WeightOnlyLinear, pack_int4

# Of an attention's operands, those that are made before it.
_OPERANDS = ("q", "k", "v")

# Dimensions of an FP8 product are multiples of this (cuBLASLt).
_MULTIPLE = 16


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class ScaledLinear(Layer):
    """An FP8 linear: one product of E4M3 operands.

    Args:
        layer: the one that it replaces, its precision final; values come from it.
    """

    calibrated = True

    def __init__(self, layer: Fp8Linear) -> None:
        super().__init__()
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            raise UsageError(
                f"an FP8 linear from {layer.in_features} to {layer.out_features} features: PyTorch "
                f"multiplies FP8 in multiples of {_MULTIPLE}",
                "keep it half by a policy file",
            )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.wide, self.follows = layer.wide, layer.follows
        self.input_amax = layer.input_amax
        self._within = layer.weight_scale.dtype
        self.weight = _parameter((layer.out_features, layer.in_features), E4M3)
        self.weight_scale = _parameter((), torch.float32)
        self.input_scale = _parameter((), torch.float32)
        self.bias = layer.bias

        # The scales are those of the ONNX graph, rounded as there.
        def scale(name: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
            source, convert = layer.SOURCES[name]
            return source, lambda weight: convert(weight).to(self._within)

        source, convert = layer.SOURCES["weight"]
        self.SOURCES: Sources = {
            "weight": (source, lambda weight: convert(weight).t()),
            "weight_scale": scale("weight_scale"),
            "input_scale": scale("input_scale"),
        }

        def stored(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
            def value(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
                source = layer.FP8_SOURCES[name](weight, scale)
                return None if source is None else change(source)

            return value

        self.FP8_SOURCES = {
            "weight": stored("weight", torch.t),
            "weight_scale": stored("weight_scale", lambda scale: scale.to(self._within)),
        }

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        return self._within

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_product(
            quantize(cast(x, self.compute_dtype(x)), self.input_scale),
            self.weight,
            self.input_scale,
            self.weight_scale,
            self.bias,
            self.output_dtype,
        )


class JoinedLinear(nn.Module):
    """Several FP8 linears of one input as one product.

    Each keeps its own weights and scale: the product is scaled by the smallest of the scales, so
    that nothing overflows, and the rest of each is a factor for its columns, applied with the bias
    by whatever reads them. Its parameters are made of those of the linears beside it.

    Args:
        names: of the linears in the module that this one is in.
        layers: they themselves.
    """

    def __init__(self, names: tuple[str, ...], layers: list[ScaledLinear]) -> None:
        super().__init__()
        self.names = names
        self._sizes = [layer.weight.shape[0] for layer in layers]
        width = sum(self._sizes)
        self.weight = _parameter((width, layers[0].weight.shape[1]), E4M3)
        self.weight_scale = _parameter((), torch.float32)
        self.input_scale = _parameter((), torch.float32)
        self.factor = _parameter((width,), torch.float32)
        self.bias = None if layers[0].bias is None else _parameter((width,), torch.float16)

    @staticmethod
    def joins(layers: list[Any]) -> bool:
        """Whether these can be one product: FP8 with one input scale, none in FP32."""
        return all(
            isinstance(layer, ScaledLinear)
            and not (layer.wide or layer.follows)
            and layer.input_amax == layers[0].input_amax
            and (layer.bias is None) == (layers[0].bias is None)
            for layer in layers
        )

    def add_norms(self, names: Sequence[str], like: torch.Tensor) -> None:
        """Hold the weights of the normalizations behind query and key too, as ``norm``.

        Args:
            names: of the normalizations beside the linears.
            like: the weights of one of them.
        """
        self._norms = tuple(names)
        self.norm = _parameter((len(names), *like.shape), like.dtype)

    def add_operand_scales(self, heads: int) -> None:
        """Hold the scales of the attention's operands, which are beside it, as ``operand_scale``.

        Args:
            heads: of the attention.
        """
        self.operand_scale = _parameter((len(_OPERANDS), heads), torch.float32)

    def compose(self, parameter: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The value of a parameter.

        Args:
            read: the value of a parameter of the module that this one is in.
        """
        if parameter == "norm":
            return torch.stack([read(f"{name}.weight") for name in self._norms])
        if parameter == "operand_scale":
            scales = torch.stack([read(f"{operand}_scale") for operand in _OPERANDS])
            return scales.float()[:, None].repeat(1, self.operand_scale.shape[1])
        if parameter == "input_scale":
            return read(f"{self.names[0]}.input_scale")
        if parameter in ("weight", "bias"):
            return torch.cat([read(f"{name}.{parameter}") for name in self.names])
        scales = torch.stack([read(f"{name}.weight_scale") for name in self.names])
        if parameter == "weight_scale":
            return scales.min()
        factors = (scales / scales.min()).unbind()
        return torch.cat([f.expand(n) for f, n in zip(factors, self._sizes, strict=True)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = torch.float16
        rows = quantize(cast(x, half), self.input_scale)
        y = scaled_product(rows, self.weight, self.input_scale, self.weight_scale, None, half)
        y = y * self.factor
        y = cast(y if self.bias is None else y + self.bias, half)
        return y.split(self._sizes, dim=-1)


class IntegerLinear(Layer):
    """A linear with INT8 or INT4 weights, which are expanded before the product.

    Args:
        layer: the one that it replaces. Its INT4 weights are two to a byte here too.
    """

    def __init__(self, layer: WeightOnlyLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.wide, self.follows = layer.wide, layer.follows
        self.packed = layer.packed
        self.block = layer.attributes.get("block_size", 1)
        shape = (self.in_features, self.out_features // 2 if self.packed else self.out_features)
        self.weight = _parameter(shape, torch.uint8 if self.packed else torch.int8)
        self.scale = layer.scale
        self.bias = layer.bias
        source, convert = layer.SOURCES["weight"]

        def packed(weight: torch.Tensor) -> torch.Tensor:
            return pack_int4(convert(weight)).view(torch.uint8).view(shape)

        self.SOURCES: Sources = {
            "weight": (source, packed if self.packed else convert),
            "scale": layer.SOURCES["scale"],
        }

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        values: torch.Tensor = self.weight
        if self.packed:
            low = torch.bitwise_and(values, 0xF)
            high = torch.bitwise_right_shift(values, 4)
            halves = torch.stack([low, high], dim=-1).flatten(-2)
            # The sign of four bits.
            values = torch.bitwise_xor(halves.to(torch.int8), 8) - 8
        weight = cast(values, self.scale.dtype)
        if self.block > 1:
            weight = (weight.unflatten(0, (-1, self.block)) * self.scale[:, None]).flatten(0, 1)
        else:
            weight = weight * self.scale
        y = torch.matmul(cast(x, dtype), cast(weight, dtype))
        return cast(y if self.bias is None else y + cast(self.bias, dtype), self.output_dtype)


class _Processor(AttentionProcessor):
    """Joined projections where there are any; PyTorch's attention, or its operands in FP8."""

    def project(
        self, attn: Any, x: torch.Tensor, names: tuple[str, str, str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        joined = getattr(attn, _JOINED[names], None)
        return super().project(attn, x, names) if joined is None else joined(x)

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if hasattr(attn, "q_scale"):
            scales = [getattr(attn, f"{operand}_scale") for operand in _OPERANDS]
            operands = [
                quantize(x, scale).transpose(1, 2)
                for x, scale in zip((query, key, value), scales, strict=True)
            ]
            of_heads = torch.stack(scales).float()[:, None].expand(-1, attn.heads)
            return fp8_attention(*operands, of_heads).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(query, key, value)


_JOINED = {IMAGE_PROJECTIONS: "joined", TEXT_PROJECTIONS: "joined_added"}


def use_torch_layers(part: nn.Module, join: bool = True) -> None:
    """Put these layers in place of those that trace to ONNX; the policy is applied before.

    Args:
        join: compute query, key and value of a stream as one product where they are FP8.

    Raises:
        UsageError: an FP8 linear whose dimensions PyTorch does not multiply.
    """
    from sd35_trt.compat.diffusers import Attention, has_joint_processor

    for name, module in list(part.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, Fp8Linear):
            setattr(part.get_submodule(parent), child, ScaledLinear(module))
        elif isinstance(module, WeightOnlyLinear):
            setattr(part.get_submodule(parent), child, IntegerLinear(module))
    for attention in [m for m in part.modules() if isinstance(m, Attention)]:
        # One of the MMDiT's, not the autoencoder's.
        if not (has_joint_processor(attention) or hasattr(attention, "q_scale")):
            continue
        attention.set_processor(_Processor())
        for names, joined in _JOINED.items():
            layers = [getattr(attention, name, None) for name in names]
            if join and JoinedLinear.joins(layers):
                setattr(attention, joined, JoinedLinear(names, layers))  # type: ignore[arg-type]


def joined_linear(part: nn.Module, names: Sequence[str]) -> JoinedLinear | None:
    """What computes linears beside each other as one product; None where each is one.

    Args:
        names: of the linears in the part.
    """
    parent = part.get_submodule(names[0].rpartition(".")[0])
    own = tuple(name.rpartition(".")[2] for name in names)
    joined = (m for m in parent.children() if isinstance(m, JoinedLinear) and m.names == own)
    return next(joined, None)
