"""Versions of PyTorch that run programs."""

from __future__ import annotations

from sd35_trt.errors import Sd35Error

#: At least the first, below the second.
SUPPORTED = ((2, 9), (2, 14))


def check_version(version: str) -> None:
    """Refuse a PyTorch that programs have not been tried with.

    Raises:
        Sd35Error: names the versions that run them.
    """
    low, high = SUPPORTED
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not low <= numbers < high:
        raise Sd35Error(
            f"programs run on PyTorch {_dotted(low)} and newer below {_dotted(high)}, "
            f"this is {version}",
            "pip install 'sd35-trt[inductor]'",
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
