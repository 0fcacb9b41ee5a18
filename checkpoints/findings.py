"""Errors of a model's parts, told together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sd35_trt.errors import CheckpointError


class Findings:
    """Keeps errors of parts until all are known."""

    def __init__(self) -> None:
        self._errors: list[CheckpointError] = []

    @contextmanager
    def part(self) -> Iterator[None]:
        """Keep an error of what is done inside."""
        try:
            yield
        except CheckpointError as error:
            self._errors.append(error)

    def tell(self) -> None:
        """Raise the errors that were kept.

        Raises:
            CheckpointError: there are some.
        """
        if self._errors:
            raise CheckpointError.together(self._errors)
