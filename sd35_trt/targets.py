"""What an engine is built for: GPU families, and the builders that serve them."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import Sd35Error, UsageError


@dataclass(frozen=True)
class Target:
    """One row of the target table.

    Attributes:
        name: what ``--gpu`` takes.
        compute_capabilities: CUDA compute capabilities as major * 10 + minor; empty for the CPU.
        builders: engine builders that can serve it, the preferred one first.
        policy: the precision policy used when the user names none.
    """

    name: str
    compute_capabilities: tuple[int, ...]
    builders: tuple[str, ...]
    policy: str


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", (), ("onnxruntime",), "fp32"),
        Target("turing", (75,), ("tensorrt-rtx",), "int8-weight"),
        Target("ampere", (80, 86), ("tensorrt-rtx",), "int8-weight"),
        Target("ada", (89,), ("tensorrt-rtx",), "fp8"),
        Target("hopper", (90,), ("tensorrt",), "fp8"),
        Target("blackwell", (100, 120), ("tensorrt-rtx",), "fp8"),
    )
}

#: Builders this version contains.
BUILDERS = ("onnxruntime",)


def find_target(name: str) -> Target:
    """Look a target up by name.

    Raises:
        UsageError: unknown name; lists the known ones.
        Sd35Error: known, but none of its builders is in this version.
    """
    target = TARGETS.get(name.lower())
    if target is None:
        raise UsageError(f"unknown GPU {name!r}", f"known: {', '.join(TARGETS)}")
    if not set(target.builders) & set(BUILDERS):
        buildable = [t.name for t in TARGETS.values() if set(t.builders) & set(BUILDERS)]
        raise Sd35Error(
            f"{target.name} needs the {target.builders[0]} builder, "
            "which this version does not have",
            f"build for: {', '.join(buildable)}",
        )
    return target
