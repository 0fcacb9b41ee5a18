"""What a plan of TensorRT for RTX says of itself in its header, read without a GPU.

The layout is not documented; it was found by building one network for several targets. The builder
compares what it reads with what it asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

# Magic, version of the header, size, library version, magic, target mask, two reserved words,
# bytes of weights; then the sections: tag, offset and size of the engine and of its weights.
_LAYOUT = struct.Struct("<4sIQQ4B4sQQQQ4sIQQ4sIQQ")
_MAGIC, _ENGINE, _WEIGHTS = b"vtrt", b"NGNE", b"THGW"

# Compute capabilities in the order of their bits in the mask.
_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class PlanHeader:
    """The header of a plan.

    Attributes:
        version: of the library that built it, e.g. ``1.7.1.116``.
        compute_capabilities: what it runs on.
        weight_bytes: size of its weights.
    """

    version: str
    compute_capabilities: tuple[str, ...]
    weight_bytes: int


def read_header(path: Path) -> PlanHeader:
    """Read a plan's header.

    Raises:
        ValueError: the file is no such plan, or cut short.
    """
    with path.open("rb") as stream:
        data = stream.read(_LAYOUT.size)
    if len(data) < _LAYOUT.size:
        raise ValueError(f"{path} is too short for a plan")
    (
        magic, _, _, size, *version, magic_again, mask, _, _, _,
        engine, _, _, _, weights, _, offset, weight_bytes,
    ) = _LAYOUT.unpack(data)  # fmt: skip
    if (magic, magic_again, engine, weights) != (_MAGIC, _MAGIC, _ENGINE, _WEIGHTS):
        raise ValueError(f"{path} has no header of TensorRT for RTX")
    if not offset + weight_bytes <= size == path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, its header says {size:,}")
    capabilities = [c for bit, c in enumerate(_CAPABILITIES) if mask >> bit & 1]
    return PlanHeader(".".join(map(str, version)), tuple(capabilities), weight_bytes)
