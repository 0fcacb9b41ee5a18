"""Prometheus metrics of a pool: ``pip install 'sd35-trt[metrics]'``.

    metrics = Metrics()
    pool = PipelinePool({"fp8": "bundles/fp8"}, observer=metrics)
    metrics.watch(pool)
    prometheus_client.start_http_server(9000)

``sd35_trt_stage_seconds`` and ``sd35_trt_request_seconds`` are histograms;
``sd35_trt_requests_total`` counts by bundle and outcome, ``sd35_trt_anomalies_total`` by bundle;
``sd35_trt_fallback`` is 1 while a bundle's fallback draws; ``sd35_trt_waiting`` counts the requests
that wait. ``sd35_trt_device_images_total`` and ``sd35_trt_device_failures_total`` count by device,
the latter what another device had to draw again; ``sd35_trt_device_memory_bytes`` is what the
process takes of a device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from sd35_trt.errors import Sd35Error

from .tracing import Span

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ModuleNotFoundError as error:
    raise Sd35Error(
        f"metrics need prometheus-client, which is not installed ({error})",
        "pip install 'sd35-trt[metrics]'",
    ) from error
except ImportError as error:
    raise Sd35Error(
        f"metrics need prometheus-client, which does not load ({error})",
        "pip install -U 'sd35-trt[metrics]'",
    ) from error

# Seconds; from mini on a CPU to Large with a full queue.
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class _Device(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def used_bytes(self) -> int: ...


class Watched(Protocol):
    """What is read of a pool."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""

    @property
    def pipelines(self) -> Mapping[str, object]:
        """By name."""

    @property
    def on_fallback(self) -> Collection[str]:
        """Names of the bundles whose fallback draws."""

    @property
    def devices(self) -> Iterable[_Device]:
        """What draws."""


class Metrics:
    """An observer that counts.

    Args:
        registry: where the metrics are registered; Prometheus' own by default, which takes one
            such object.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._stages = Histogram(
            "sd35_trt_stage_seconds", "Time of a stage of a request",
            ["bundle", "stage"], buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "sd35_trt_request_seconds", "Time from arrival to end, waiting included",
            ["bundle", "outcome"], buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self._requests = Counter(
            "sd35_trt_requests", "Requests by how they ended", ["bundle", "outcome"],
            registry=registry,
        )  # fmt: skip
        self._anomalies = Counter(
            "sd35_trt_anomalies", "Images unlike those of calibration", ["bundle"],
            registry=registry,
        )  # fmt: skip
        self._waiting = Gauge("sd35_trt_waiting", "Requests that wait", registry=registry)
        self._fallback = Gauge(
            "sd35_trt_fallback", "1 while the fallback draws", ["bundle"], registry=registry
        )
        self._device_images = Counter(
            "sd35_trt_device_images", "Images by the device that drew them", ["device"],
            registry=registry,
        )  # fmt: skip
        self._device_failures = Counter(
            "sd35_trt_device_failures", "Requests that another device had to draw", ["device"],
            registry=registry,
        )  # fmt: skip
        self._device_memory = Gauge(
            "sd35_trt_device_memory_bytes", "Taken of the device's memory", ["device"],
            registry=registry,
        )  # fmt: skip

    def __call__(self, span: Span) -> None:
        """Count a span."""
        bundle = str(span.attributes["bundle"])
        if span.name == "request":
            outcome = str(span.attributes["outcome"])
            self._requests.labels(bundle, outcome).inc()
            self._seconds.labels(bundle, outcome).observe((span.end_ns - span.start_ns) / 1e9)
            if outcome == "ok" and "device" in span.attributes:
                images = float(span.attributes["images"])
                self._device_images.labels(str(span.attributes["device"])).inc(images)
        elif span.name == "retry":
            self._device_failures.labels(str(span.attributes["device"])).inc()
        elif span.name == "anomaly":
            self._anomalies.labels(bundle).inc()
        else:
            self._stages.labels(bundle, span.name).observe(float(span.attributes["seconds"]))

    def watch(self, pool: Watched) -> None:
        """Report a pool's queue, fallbacks and devices whenever metrics are read."""
        self._waiting.set_function(lambda: pool.waiting)
        for name in pool.pipelines:
            self._fallback.labels(name).set_function(
                lambda name=name: float(name in pool.on_fallback)
            )
        for one in pool.devices:
            self._device_images.labels(one.name)
            self._device_failures.labels(one.name)
            self._device_memory.labels(one.name).set_function(lambda one=one: one.used_bytes)
