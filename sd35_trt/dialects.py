"""What the exporter writes: ONNX of an opset, or a program of PyTorch operators; one row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """One form of an exported component.

    Attributes:
        name: as the table of backends has it.
        opset: of ONNX's operators; None where it is a program.
        ir_version: of ONNX's files, the first that knows the opset.
        composite: whether Attention, RMSNormalization and GroupNormalization are single operators;
            otherwise they are spelled out, as TensorRT before 10.15 wants them.
        miscomputed: precisions that are not written, because a library that reads the dialect was
            seen to compute them wrongly.
    """

    name: str
    opset: int | None
    ir_version: int | None = None
    composite: bool = True
    miscomputed: tuple[str, ...] = ()

    def onnx_versions(self) -> tuple[int, int]:
        """Opset and IR version.

        Raises:
            ValueError: it is none of ONNX's.
        """
        if self.opset is None or self.ir_version is None:
            raise ValueError(f"{self.name} is not a dialect of ONNX")
        return self.opset, self.ir_version


_ROWS = (
    Dialect("opset23", 23, 11),
    # TensorRT 10.6 on an H100: mini's latents were off by 0.6 to 0.9 of their size.
    Dialect("opset21", 21, 10, composite=False, miscomputed=("int8-weight",)),
    Dialect("program", None),
)

#: Every dialect by name.
DIALECTS: dict[str, Dialect] = {row.name: row for row in _ROWS}

#: Of those written in ONNX, the one with the fewest operators a layer.
ONNX = "opset23"
