"""Texts of requests, as the runtime reads them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _without_surrogates(value: Any) -> Any:
    """Halves of surrogate pairs become U+FFFD, as in the runtime; JSON can escape them."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, BeforeValidator(_without_surrogates)]
