"""What an operator decides about a server."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.reading import read_file, reason_of

_LEAST_TOKEN = 16

# Bytes.
_LARGEST_FILE = 4096


@dataclass(frozen=True)
class Settings:
    """Limits and secrets of a server.

    Attributes:
        token: what clients send as ``Authorization: Bearer``; None lets everybody draw.
        admin_token: the same for the admin endpoints; None refuses them.
        key_header: name of the header whose value keeps a user on one bundle; None takes the
            body's ``user``.
        time_limit: seconds of a request, waiting and drawing together.
        body_limit: bytes of a request's body.
        upload_limit: seconds until a request's body is there.
        grace: seconds that accepted requests have after SIGTERM.
        local: the server listens on a loopback address without a token: pages of other sites
            are refused.
        adapters: names that requests may use; no other is looked for.
        pictures: uint8 [H, W, 3] by the name that requests may use in place of sending one.
    """

    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    key_header: str | None = None
    time_limit: float = 300.0
    body_limit: int = 32 << 20
    upload_limit: float = 60.0
    grace: float = 8.0
    local: bool = False
    adapters: frozenset[str] = frozenset()
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)


def read_token(path: Path, option: str) -> str:
    """The token in a file, without the space around it.

    Raises:
        UsageError: no such file, or no token that is worth one.
    """
    try:
        token = read_file(path, _LARGEST_FILE).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is not ASCII text"
        raise UsageError(f"{option} {path}: {reason}", "name a file with the token") from error
    if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
        raise UsageError(
            f"{option} {path}: a token has at least {_LEAST_TOKEN} characters and no space",
            f"make one with: openssl rand -hex 32 > {path}",
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
