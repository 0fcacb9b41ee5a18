"""What replicas are asked, and what they answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sd35_trt.errors import Sd35Error
from sd35_trt.runtime import Result

from ..drawing import Seen


@dataclass(frozen=True)
class Order:
    """A request on its way to a replica. It has a seed: each replica draws the same of it.

    Attributes:
        bundle: the bundle's directory.
        arguments: of :meth:`sd35_trt.runtime.Pipeline.request`.
        seconds: for waiting and drawing together.
        shown: whether a step is shown as a preview, by its index and their number; None watches
            no step.
    """

    bundle: str
    arguments: Mapping[str, Any]
    seconds: float
    shown: Callable[[int, int], bool] | None = None


#: The steps that are watched; last the result, or why there is none.
Answers = AsyncGenerator[Seen | Result | Sd35Error, None]


class ReplicaLost(Exception):
    """A replica ended, or is not reached, while it drew."""
