"""What every value of a traced graph has, though ``onnx_ir`` allows values without."""

from __future__ import annotations

import onnx_ir as ir


def value_name(value: ir.Value) -> str:
    """The name of a value.

    Raises:
        ValueError: it has none.
    """
    if value.name is None:
        raise ValueError(f"a value of the traced graph has no name: {value!r}")
    return value.name


def value_dtype(value: ir.Value) -> ir.DataType:
    """The element type of a value.

    Raises:
        ValueError: it has none.
    """
    if value.dtype is None:
        raise ValueError(f"{value.name!r} of the traced graph has no type")
    return value.dtype


def value_shape(value: ir.Value) -> ir.Shape:
    """The shape of a value.

    Raises:
        ValueError: it has none.
    """
    if value.shape is None:
        raise ValueError(f"{value.name!r} of the traced graph has no shape")
    return value.shape
