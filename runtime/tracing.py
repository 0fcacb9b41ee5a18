"""What an observer of a pool is told, as tracing and metrics take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sd35_trt.errors import Cancelled, PoolBusy, TimedOut, UsageError

from .job import Job
from .timing import now_ns


@dataclass(frozen=True)
class Span:
    """A stage of a request, or the whole of it.

    It is what OpenTelemetry takes: ``tracer.start_span(span.name, context=span.trace,
    start_time=span.start_ns, attributes=span.attributes).end(span.end_ns)``.

    Attributes:
        name: ``request`` for the whole, last; before it its stages ``queue``, ``text``,
            ``encode``, ``conditioning``, ``denoise`` and ``decode``; ``anomaly`` for a moment;
            ``retry`` where a device failed and another draws the request again.
        start_ns, end_ns: nanoseconds since the epoch.
        attributes: strings, numbers and booleans. Always ``bundle``; ``device`` of what was drawn,
            or failed to; of a stage ``seconds``, the time that it took itself: conditioning and
            denoising take turns.
        trace: what the request was given as ``trace``.
    """

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | float | bool] = field(default_factory=dict)
    trace: Any = None


#: Called with every span, in whichever thread ends the request.
Observer = Callable[[Span], object]


def outcome_attributes(bundle: str, error: BaseException | None) -> dict[str, str]:
    """Attributes of the span of a whole request.

    Args:
        error: why there is no result; None where there is one.
    """
    names = ((UsageError, "invalid"), (PoolBusy, "busy"), (Cancelled, "cancelled"),
             (TimedOut, "timeout"))  # fmt: skip
    failure = next((name for kind, name in names if isinstance(error, kind)), "error")
    return {"bundle": bundle, "outcome": "ok" if error is None else failure}


def retry_span(bundle: str, device: str, trace: Any, error: BaseException) -> Span:
    """What an observer is told of a request that a device failed to draw, and another draws."""
    now = now_ns()
    return Span("retry", now, now, {"bundle": bundle, "device": device, "what": str(error)}, trace)


def request_spans(
    job: Job, bundle: str, trace: Any, error: BaseException | None, device: str | None
) -> list[Span]:
    """What an observer is told of a request that ends now.

    Args:
        bundle: name of the bundle that it went to.
        trace: what it was given as ``trace``.
        error: why there is no result; None where there is one.
        device: that drew it; None where it only waited.

    Returns:
        Its stages and anomalies; last, the whole.
    """
    end, clock = now_ns(), job.clock
    queued = end if clock is None else clock.start_ns
    about: dict[str, str | float | bool] = {"bundle": bundle}
    if device is not None:
        about["device"] = device
    waited = {**about, "seconds": (queued - job.created_ns) / 1e9}
    spans = [Span("queue", job.created_ns, queued, waited, trace)]
    for name, stage in [] if clock is None else list(clock.stages.items()):
        duration = {**about, "seconds": stage.taken_ns / 1e9}
        spans.append(Span(name, stage.start_ns, stage.end_ns, duration, trace))
    for anomaly in job.anomalies:
        what = {**about, "step": anomaly.step, "seed": anomaly.seed, "prompt": anomaly.prompt,
                "what": anomaly.what}  # fmt: skip
        spans.append(Span("anomaly", end, end, what, trace))
    about.update(outcome_attributes(bundle, error), images=len(job.request.seeds))
    return [*spans, Span("request", job.created_ns, end, about, trace)]
