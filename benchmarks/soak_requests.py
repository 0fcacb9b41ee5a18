"""What a pool is asked for under load: good requests, and those that should harm nobody else."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from sd35_trt.errors import Cancelled, Sd35Error, TimedOut, UsageError
from sd35_trt.runtime import PipelinePool, Result, Step

_PROMPTS = ("a red star", "two blue squares", "a small green circle on white", "no ring, a cross")

# What becomes of a request, and how often of a hundred.
_KINDS = {"draw": 68, "extreme": 6, "cancel": 6, "timeout": 5, "callback": 6, "invalid": 9}

#: Kinds that are drawn, and equal what their request gives alone.
DRAWN = ("draw", "extreme", "cancel", "timeout")

# Within what is allowed, and far from what anybody wants.
_EXTREMES: tuple[dict[str, Any], ...] = (
    {"guidance": 100},
    {"guidance": 0.0, "negative": "red"},
    {"shift": 0.01},
    {"shift": 100},
    {"sampler": "dpmpp-2m", "guidance": 60},
    {"prompt": "a cut emoji \ud83d", "negative": "\udc00"},
    {"prompt": "a star " * 1400},
    {"prompt": ["", "\x00\u2028"], "seed": [2**64 - 1, 0]},
)

# Refused when it is made.
_INVALID: tuple[dict[str, Any], ...] = (
    {"steps": 0}, {"steps": True}, {"steps": 2.5}, {"steps": "3"}, {"steps": 10**4000},
    {"size": (65, 64)}, {"size": 128}, {"size": None, "image": 3}, {"bundle": "c"},
    {"bundle": 7}, {"seed": -1}, {"seed": None}, {"seed": [7.9]}, {"seed": {}},
    {"negative": None}, {"guidance": "3"}, {"guidance": float("nan")}, {"guidance": 1e39},
    {"shift": 1e-300}, {"shift": -1}, {"prompt": {"a": 1}}, {"prompt": b"a star"},
    {"prompt": ["a star", None]}, {"prompt": "x" * 10_000_000}, {"prompt": []}, {"key": 17},
    {"cancel": True}, {"callback": "call"}, {"timeout": "soon"}, {"batch": 10**9},
    {"image": "/etc/passwd"}, {"sampler": ["euler"]}, {"t5_tokens": -5}, {"strength": 2},
)  # fmt: skip


@dataclass(frozen=True)
class SoakRequest:
    """A request: which bundle, what to draw, and what becomes of it."""

    bundle: str
    kind: str
    arguments: dict[str, Any]

    @property
    def picture(self) -> tuple[Any, ...]:
        """What decides the picture."""
        return (
            self.bundle,
            *((name, str(value)) for name, value in sorted(self.arguments.items())),
        )


def make_requests(count: int, steps: int, seed: int = 0) -> list[SoakRequest]:
    """Requests by chance: two bundles, four prompts, seeds, guidance and two numbers of steps."""
    rng = random.Random(seed)
    kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=count)
    return [SoakRequest(rng.choice("ab"), kind, _arguments(rng, kind, steps)) for kind in kinds]


def _arguments(rng: random.Random, kind: str, steps: int) -> dict[str, Any]:
    return {
        "prompt": rng.choice(_PROMPTS),
        "seed": rng.randrange(6),
        "guidance": rng.choice((1.0, 3.0, 5.0)),
        "steps": steps + rng.randrange(2),
        **(rng.choice(_EXTREMES) if kind == "extreme" else {}),
    }


def _draw(pool: PipelinePool, arguments: Mapping[str, Any], rng: random.Random) -> Result:
    return pool.generate(**arguments)


def _cancel(pool: PipelinePool, arguments: Mapping[str, Any], rng: random.Random) -> Result:
    """By an event, or by the future."""
    event, moment = threading.Event(), rng.uniform(0, 0.2)
    if rng.random() < 0.5:
        threading.Timer(moment, event.set).start()
        return pool.generate(**arguments, cancel=event)
    future = pool.submit(**arguments)
    threading.Timer(moment, future.cancel).start()
    return future.result()


def _limit(pool: PipelinePool, arguments: Mapping[str, Any], rng: random.Random) -> Result:
    return pool.generate(**arguments, timeout=rng.uniform(0, 0.05))


class Misbehaved(Exception):
    """What a callback raises here."""


def _misbehave(pool: PipelinePool, arguments: Mapping[str, Any], rng: random.Random) -> Result:
    """A callback that raises, ends the process, or calls back where it must not."""

    def fail(step: Step) -> None:
        raise Misbehaved

    callbacks: tuple[Callable[[Step], object], ...] = (
        fail,
        lambda step: sys.exit(3),
        lambda step: pool.generate("a star"),
        lambda step: pool.close(),
        lambda step: pool.pipelines[arguments["bundle"]].generate("a star"),
        lambda step: False,
    )
    return pool.generate(**arguments, callback=rng.choice(callbacks))


def _refused(pool: PipelinePool, arguments: Mapping[str, Any], rng: random.Random) -> Result:
    return pool.generate(**{**arguments, **rng.choice(_INVALID)})


#: Kind → sends such a request, and waits for its result.
SENDERS: dict[str, Callable[[PipelinePool, Mapping[str, Any], random.Random], Result]] = {
    "draw": _draw,
    "extreme": _draw,
    "cancel": _cancel,
    "timeout": _limit,
    "callback": _misbehave,
    "invalid": _refused,
}

# Kind → how a request of it may end instead of being drawn, in which words.
_ENDS: dict[str, dict[type[BaseException], str]] = {
    "draw": {},
    "extreme": {},
    "cancel": {Cancelled: "cancelled", CancelledError: "cancelled"},
    "timeout": {TimedOut: "timed out"},
    "callback": {
        Misbehaved: "its own error",
        SystemExit: "its own error",
        UsageError: "called back",
        Cancelled: "cancelled",
    },
    "invalid": {UsageError: "refused"},
}


def judge(kind: str, error: BaseException) -> tuple[str, str]:
    """How a request of a kind ended, by its error, and what is wrong with that."""
    for expected, word in _ENDS[kind].items():
        if isinstance(error, expected):
            return word, ""
    known = isinstance(error, Sd35Error)
    return "failed", str(error) if known else f"{type(error).__name__}: {error}"
