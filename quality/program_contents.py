"""What is in a program of PyTorch's operators."""

from __future__ import annotations

from collections import Counter

from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.formats.program import View, read_program

from .contents import Contents


def look_inside(bundle: Bundle, component: Component) -> Contents:
    """Operators by name, each as often as it is called in a step that is given nothing besides.

    Raises:
        BundleError: the program is damaged, or of another version.
    """
    program = read_program(bundle.path(component.files[0].path))
    operators: Counter[str] = Counter()
    for step in program.steps:
        given = any(condition.holds for condition in step.conditions)
        if not (given or isinstance(step, View)):
            operators.update(node.target for node in program.graphs[step.graph].nodes)
    return Contents(f"program, PyTorch {program.torch}", dict(operators))
