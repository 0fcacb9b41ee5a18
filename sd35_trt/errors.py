"""Errors a user can cause. Each is one line: what, where, and what to do about it.

* Sd35Error
  · UsageError (also ValueError)
  · CheckpointError
  · BundleError
  · OutOfMemory
  · Cancelled
  · NotFinite
  · TimedOut (also TimeoutError)
  · PoolBusy

What a program calls wrongly, without a user's doing, is a TypeError or a ValueError of Python's.
"""

from __future__ import annotations

from collections.abc import Sequence


class Sd35Error(Exception):
    """A failure explained in one line; the command line exits with status 1.

    Args:
        message: what went wrong and where, one line.
        fix: what the user can do about it, ideally a command; appended after a dash.
    """

    exit_status = 1

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.fix = fix
        text = " ".join(message.split())
        if fix:
            text = f"{text.rstrip('.')} — {fix}"
        super().__init__(text)


class UsageError(Sd35Error, ValueError):
    """An argument outside what the model, the bundle or the command accepts; exit status 2."""

    exit_status = 2


class CheckpointError(Sd35Error):
    """A model directory that is missing, damaged, or not Stable Diffusion 3.5.

    A look at a model tells all that is wrong: one line a part, each as of one error.
    """

    @classmethod
    def together(cls, errors: Sequence[CheckpointError]) -> CheckpointError:
        """One error that has the lines of several; the fix is the first's."""
        result = cls("", errors[0].fix)
        result.args = ("\n".join(dict.fromkeys(map(str, errors))),)
        return result


class BundleError(Sd35Error):
    """A bundle that is missing, damaged, foreign, or made for something else."""


class OutOfMemory(Sd35Error):
    """A device, or a budget, has no room for what was asked."""


class Cancelled(Sd35Error):
    """The caller, or a step callback, asked to stop."""


class NotFinite(Sd35Error):
    """An image whose latents are NaN or infinite."""


class TimedOut(Sd35Error, TimeoutError):
    """A request was not drawn within its time."""


class PoolBusy(Sd35Error):
    """As many requests are waiting as the pool admits."""
