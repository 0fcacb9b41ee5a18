"""What was measured of the kinds of engine, side by side; the figures are in ``gpus.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .targets import Target, target_data


@dataclass(frozen=True)
class Measurement:
    """One computation on one GPU by several kinds of engine.

    Attributes:
        family: of the GPU.
        gpu: with its article.
        policy: name of the policy.
        what: was computed.
        ms: milliseconds by kind of engine.
    """

    family: str
    gpu: str
    policy: str
    what: str
    ms: Mapping[str, float] = field(hash=False)


def measurements() -> list[Measurement]:
    """All, in the order of ``gpus.toml``."""
    return [Measurement(**row) for row in target_data()["measurement"]]


def faster_builder(target: Target, builder: str, policy: str) -> str | None:
    """The line that names a faster kind of engine for a target; None where none was measured.

    Args:
        builder: the kind that was taken.
        policy: name of the policy.
    """
    for row in measurements():
        if row.family != target.family or row.policy != policy or builder not in row.ms:
            continue
        ms, best = min((ms, name) for name, ms in row.ms.items() if name in target.builders)
        if best != builder:
            return (
                f"{best} was faster: {row.what} took {ms:g} ms on {row.gpu}, with {builder} "
                f"{row.ms[builder]:g} ms; build with: --builder {best}"
            )
    return None
