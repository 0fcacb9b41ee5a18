"""Bundles, adapters and pictures by the names that requests use, and where requests go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.runtime.source_pictures import pixels_of
from sd35_trt.runtime.traffic import Traffic

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


def named_bundles(given: Sequence[str]) -> dict[str, Path]:
    """Directories by name.

    Raises:
        UsageError: a name that occurs twice.
    """
    bundles: dict[str, Path] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        name, path = (match[1], Path(match[2])) if match else (Path(one).resolve().name, Path(one))
        if name in bundles:
            raise UsageError(f"two bundles are called {name}", f"name one of them: OTHER={path}")
        bundles[name] = path
    return bundles


def named_files(given: Sequence[str], option: str) -> dict[str, Path]:
    """Files by the name that requests use.

    Args:
        given: ``NAME=FILE``.
        option: for the message.

    Raises:
        UsageError: no name, or one that occurs twice.
    """
    files: dict[str, Path] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        if match is None:
            raise UsageError(
                f"{option} {one} has no name", f"give it one: {Path(one).stem or 'style'}={one}"
            )
        if match[1] in files:
            raise UsageError(f"two of {option} are called {match[1]}", "rename one of them")
        files[match[1]] = Path(match[2])
    return files


def read_pictures(files: Mapping[str, Path], option: str) -> dict[str, np.ndarray]:
    """Pictures of files by name: uint8 [H, W, 3].

    Args:
        option: for the message.

    Raises:
        UsageError: a file that is no picture.
    """
    return {name: pixels_of(option, path, None) for name, path in files.items()}


def named_fallbacks(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Directories by the name of the bundle that each stands in for.

    Args:
        names: of the bundles.

    Raises:
        UsageError: an unknown name.
    """
    fallbacks: dict[str, Path] = {}
    for one in given:
        match = _NAMED.fullmatch(one)
        if match is None:
            fallbacks.update(dict.fromkeys(names, Path(one)))
        elif match[1] in names:
            fallbacks[match[1]] = Path(match[2])
        else:
            raise UsageError(
                f"--fallback {one}: there is no bundle {match[1]}",
                f"use one of: {', '.join(names)}",
            )
    return fallbacks


def parse_devices(text: str | None) -> list[str | None]:
    """Devices of ``cuda:0,cuda:1``; None is a bundle's usual one.

    Raises:
        UsageError: a comma too many.
    """
    if text is None:
        return [None]
    devices = [part.strip() for part in text.split(",")]
    if not all(devices):
        raise UsageError(f"--device {text} has a device without a name", "write cuda:0,cuda:1")
    return [*devices]


def parse_traffic(text: str, names: Sequence[str]) -> Mapping[str, float]:
    """Shares of ``half=90,fp8=10``: percent by name.

    Args:
        names: of the bundles.

    Raises:
        UsageError: another form, an unknown name, or another sum than 100.
    """
    shares = {}
    for part in filter(None, text.split(",")):
        name, _, share = part.strip().rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UsageError(
                f"--traffic {text} is no split", "say it in percent, as half=90,fp8=10"
            ) from None
        if name not in names:
            raise UsageError(
                f"--traffic {text}: there is no bundle {name}", f"use one of: {', '.join(names)}"
            )
    if shares:
        Traffic(shares)
    return shares
