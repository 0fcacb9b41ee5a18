"""Flags by which one model's process tells another's that nobody waits for a request any more.

Triton does not hand a cancellation from a model on to the model that it asked.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from pathlib import Path

_KEY = "sd35_trt_cancel"
_TOKEN = re.compile(r"[0-9a-f]{32}")


class CancelFlag:
    """A flag: a file that is there when it is set.

    Args:
        token: names it among processes; None makes a new one.
    """

    def __init__(self, token: str | None = None) -> None:
        self._token = secrets.token_hex(16) if token is None else token
        self._path = Path(tempfile.gettempdir()) / f"sd35-trt-{os.getuid()}-{self._token}.cancel"

    @classmethod
    def of_parameters(cls, parameters: str) -> CancelFlag | None:
        """The flag that a request came with; None where there is none.

        Args:
            parameters: of the request, as JSON.
        """
        found = json.loads(parameters or "{}").get(_KEY)
        if not isinstance(found, str) or not _TOKEN.fullmatch(found):
            return None
        return cls(found)

    @property
    def parameters(self) -> dict[str, str | int | bool]:
        """What a request is to come with."""
        return {_KEY: self._token}

    def set(self) -> None:
        """Nobody waits any more."""
        self._path.touch()

    @property
    def is_set(self) -> bool:
        """Whether nobody waits any more."""
        return self._path.exists()

    def remove(self) -> None:
        """The request has ended."""
        self._path.unlink(missing_ok=True)
