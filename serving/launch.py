"""From bundles on a command line to a server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Pipeline, PipelinePool
from sd35_trt.runtime.metrics import Metrics

from .app import make_app
from .names import (
    named_bundles,
    named_fallbacks,
    named_files,
    parse_devices,
    parse_traffic,
    read_pictures,
)
from .server import address_of, bind, run
from .service import Service
from .settings import Settings, is_loopback


@dataclass(frozen=True)
class Launch:
    """What a server is started with.

    Attributes:
        bundles: ``DIR`` or ``NAME=DIR``; the name of a ``DIR`` is its last part.
        host, port: 0 takes any free port.
        traffic: see :func:`~sd35_trt.serving.names.parse_traffic`; empty sends all to the
            first bundle.
        adapters: ``NAME=FILE``, known to every bundle that takes adapters.
        controls: ``NAME=FILE`` of pictures that requests may have nets follow.
        fallbacks: ``NAME=DIR`` for a bundle's fallback, ``DIR`` for every bundle's.
        queue: how many requests may wait.
        device: where every bundle is loaded; several with commas between draw side by side.
        threads, vram_budget, trust_kernels: see :meth:`sd35_trt.runtime.Pipeline.load`.
        settings: see :class:`~sd35_trt.serving.settings.Settings`.
    """

    bundles: Sequence[str]
    host: str
    port: int
    traffic: str
    adapters: Sequence[str]
    controls: Sequence[str]
    fallbacks: Sequence[str]
    queue: int
    threads: int | None
    device: str | None
    vram_budget: int | None
    trust_kernels: bool
    settings: Settings


def launch(options: Launch, started: Callable[[str], object]) -> None:
    """Load the bundles, draw with each, and serve until a signal says otherwise.

    Args:
        started: called with the server's URL when it takes requests.

    Raises:
        UsageError: an option that does not fit; nothing was loaded.
        BundleError, OutOfMemory, Sd35Error: see :meth:`sd35_trt.runtime.Pipeline.load`.
        KeyboardInterrupt: see :func:`~sd35_trt.serving.server.run`.
    """
    bundles = named_bundles(options.bundles)
    fallbacks = named_fallbacks(options.fallbacks, list(bundles))
    shares = parse_traffic(options.traffic, list(bundles))
    devices = parse_devices(options.device)
    adapters = named_files(options.adapters, "--adapter")
    settings = replace(
        options.settings,
        adapters=frozenset(adapters),
        pictures=read_pictures(named_files(options.controls, "--control"), "--control"),
    )
    local = is_loopback(options.host)
    if settings.token is None and not local:
        raise UsageError(
            f"--host {options.host} is reached from elsewhere, and there is no token",
            "give --token-file FILE, or leave out --host",
        )
    settings = replace(settings, local=local and settings.token is None)
    with ExitStack() as opened:
        sock = opened.enter_context(bind(options.host, options.port))
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        metrics = Metrics(registry)
        pipes: dict[str, list[Pipeline]] = {name: [] for name in bundles}
        for name, device in itertools.product(bundles, devices):
            pipe = Pipeline.load(
                bundles[name], fallback=fallbacks.get(name), device=device,
                threads=options.threads, vram_budget=options.vram_budget,
                trust_kernels=options.trust_kernels,
            )  # fmt: skip
            pipes[name].append(opened.enter_context(pipe))
        pool = PipelinePool(pipes, queue_limit=options.queue, observer=metrics)
        opened.callback(pool.close, wait=False)
        for name, path in adapters.items():
            pool.load_adapter(name, path)
        if shares:
            pool.set_traffic(shares)
        metrics.watch(pool)
        service = Service(pool, settings)
        service.warm_up()
        run(make_app(service, registry, pool), service, sock, lambda: started(address_of(sock)))
