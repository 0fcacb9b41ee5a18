"""How long work reports what of it is done."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that long work calls now and then."""

    def __call__(self, stage: str, done: float, total: float, note: str = "", /) -> None:
        """Take a report.

        Args:
            stage: what is being done, e.g. a component that is exported.
            done: how much of it is done, of ``total``; in the stage's own units, which are
                countable where the total is more than 1.
            note: what exactly is being done.
        """


def silent(stage: str, done: float, total: float, note: str = "", /) -> None:
    """A :class:`Progress` that nobody sees."""
