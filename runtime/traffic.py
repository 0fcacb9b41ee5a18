"""Which bundle a request goes to: shares in percent, the same bundle for the same key."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping

from sd35_trt.errors import UsageError


class Traffic:
    """Splits requests among names by shares.

    A request with a key goes where weighted rendezvous hashing sends it (Mosko et al., 1998): a
    pure function of the key and the shares, equal in every process. When one share rises and the
    others fall in proportion, as always with two names, only keys move that have to, and those
    to the name that rose. Other changes move at most twice as many keys as they must.

    Args:
        shares: name → percent of the requests, 100 in all; 0 sends none.

    Raises:
        UsageError: a share below 0, or another sum.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        if any(not share >= 0 for share in shares.values()):
            raise UsageError(f"shares must not be negative: {dict(shares)}")
        total = sum(shares.values())
        if not math.isclose(total, 100):
            raise UsageError(f"the shares are {total:g} % in all", "give percentages of 100")
        self.shares = dict(shares)
        self._names = [name for name, share in shares.items() if share]

    def choose(self, key: str | None = None) -> str:
        """The name for a request.

        Args:
            key: what is to stay where it is, such as a user's id; None draws a name at random.
        """
        if len(self._names) == 1:
            return self._names[0]
        if key is None:
            return random.choices(self._names, [self.shares[n] for n in self._names])[0]
        # The first of exponential waiting times whose rates are the shares.
        return min(self._names, key=lambda n: -math.log(_uniform(key, n)) / self.shares[n])


def _uniform(key: str, name: str) -> float:
    """A number in (0, 1) that depends on both."""
    digest = hashlib.sha256(f"{len(key)}:{key}{name}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
