"""Components that are traced in one piece."""

from __future__ import annotations

import onnx_ir as ir

from sd35_trt.dialects import Dialect
from sd35_trt.formats.program import Program

from .ports import ComponentModule
from .program_writer import single_graph
from .trace import trace


class WholeModule(ComponentModule):
    """A component, or a segment of one, whose graph is that of its ``forward``."""

    def trace(self, dialect: Dialect) -> ir.Model:
        """See :func:`sd35_trt.export.trace.trace`."""
        return trace(self, dialect)

    def program(self) -> Program:
        """See :func:`sd35_trt.export.program_writer.single_graph`."""
        return single_graph(self)
