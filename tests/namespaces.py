"""Processes with other ids, other rights or other disks, as in a container: by unshare(1)."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

#: A user without a name or a home directory, and without root's rights.
NAMELESS = ("--user", "--map-user=12345")

#: Process ids of its own.
PROCESSES = ("--user", "--map-root-user", "--pid", "--fork", "--kill-child")

#: Disks of its own.
DISKS = ("--user", "--map-root-user", "--mount")


def python_in(namespace: tuple[str, ...], *arguments: object) -> list[str]:
    """The command that runs Python so; skips the test where that is not allowed.

    Args:
        arguments: Python's.
    """
    return _allowed(("unshare", *namespace, sys.executable), arguments)


def python_on(disks: Mapping[Path, str], *arguments: object) -> list[str]:
    """The command that runs Python with other disks; skips the test where that is not allowed.

    Args:
        disks: ``ro`` for a folder that is only read there, else the size of an empty disk.
    """
    mounts = [
        f"mount --bind '{path}' '{path}' && mount -o remount,bind,ro '{path}'"
        if what == "ro"
        else f"mount -t tmpfs -o size={what} none '{path}'"
        for path, what in disks.items()
    ]
    script = " && ".join([*mounts, f"exec '{sys.executable}' \"$@\""])
    return _allowed(("unshare", *DISKS, "sh", "-c", script, "sh"), arguments)


def _allowed(command: tuple[str, ...], arguments: tuple[object, ...]) -> list[str]:
    if reason := _refusal(command):
        pytest.skip(f"other namespaces are not allowed here: {reason}")
    return [*command, *map(str, arguments)]


@functools.cache
def _refusal(command: tuple[str, ...]) -> str:
    """Why a command does not run; empty where it does."""
    try:
        tried = subprocess.run([*command, "-c", ""], capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return "" if tried.returncode == 0 else tried.stderr.strip() or "unshare fails"
